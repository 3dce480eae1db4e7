"""Escape characters that could control a terminal, because names may come from a hostile file."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with every character that is neither visible nor a space replaced by its code, such as `\x1b`.

    These are control characters (C0, C1), line ends, marks that change the direction of text, and lone surrogates
    (bytes of a file's name that are not UTF-8). The result is always one line.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _code(ord(c)) for c in text)


def paragraph(text: str) -> str:
    """The same for text of several lines. All but the first are indented, so that none looks like a new message."""
    return "\n  ".join(printable(line) for line in text.split("\n"))


def _code(point: int) -> str:
    known = {0x0A: r"\n", 0x0D: r"\r", 0x09: r"\t"}
    if point in known:
        return known[point]
    if point <= 0xFF:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"
