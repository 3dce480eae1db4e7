"""What is shown as it is, and what only as its code: names from a hostile file must not steer a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with every character that is no visible one or a space as its code, as `\x1b`.

    Control characters (C0, C1), line ends, marks that change the direction of text, and the lone surrogates that stand
    for bytes of a file's name that are not UTF-8. A line is one line, whatever is in it.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _code(ord(c)) for c in text)


def paragraph(text: str) -> str:
    """The same for text of several lines: all but the first are indented, so that none passes for a line of ours."""
    return "\n  ".join(printable(line) for line in text.split("\n"))


def _code(point: int) -> str:
    known = {0x0A: r"\n", 0x0D: r"\r", 0x09: r"\t"}
    if point in known:
        return known[point]
    if point <= 0xFF:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"
