"""Plain technical English in everything that a reader sees: docs, help, messages, docstrings, comments, recipes.

A short list of words that readers whose first language is not English misread. Each has its reason and a replacement.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Pattern -> why it is hard to read, and what to write.
HARD = {
    r"\bshall\b": "formal and ambiguous: write must, can or will",
    r"\botherwise\b": "three meanings: write if not, else, in another way",
    r"\bat hand\b": "an idiom: write available, or leave it out",
    r"\bmade[- ]up\b": "sounds like a lie: write synthetic",
    r"\b(?:is|are) said\b": "hides who says it: name what reports or declares it",
    r"\bwhat [\w ]{1,30}\b(?:is|are) for\b": "an inverted question: write the purpose of, or used for",
    r"\bmend(?:s|ed|ing)?\b": "old-fashioned: write fix or repair",
    r"\bfor want of\b": "old-fashioned: write because there is no, or missing",
    r"\bafresh\b|\banew\b": "old-fashioned: write again",
    r"\bwhoever\b": "vague: name the person, the process or the caller",
    r"\btold apart\b|\btell apart\b": "an idiom: write distinguished, or equal",
    r"\b(?:not|no)\b[^.;:]{1,40}\bany more\b": "write no longer",
    r"\bturn(?:s|ed|ing)? over\b": "an idiom: write changed its order",
    r"\b(?:is|are) asked\b(?! to)": "write is called, gets a request, or is requested",
    r"\bwas seen\b|\bseen (?:at worst|\d)": "write was measured, or measured",
    r"\bat worst\b": "write at most, or at least",
    r"(?<!here )\b(?:is|are) no (?:bundle|file|image|multiple|object|list|JSON|address|regular)\b": "write is not a",
}
_CODE = re.compile(r"```.*?```|`[^`\n]*`", flags=re.DOTALL)


def prose_of_python(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each string and comment; names in the code are not prose."""
    inside = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in inside:
            yield token.start[0], re.sub(r"\{[^{}\n]*\}", "{}", token.string)


def pages() -> list[Path]:
    """Every text that users and contributors read; found, not listed."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "Makefile"]
    for folder, pattern in (
        ("docs", "*.md"), ("dinoexport", "**/*.py"), ("dinoexport", "**/*.jinja"), ("recipes", "**/*.toml"),
        ("validate", "*.toml"), ("serving", "**/*.yaml"),
    ):  # fmt: skip
        found += sorted((ROOT / folder).glob(pattern))
    return found


def hard_words(path: Path) -> list[str]:
    text = path.read_text()
    prose = prose_of_python(text) if path.suffix == ".py" else enumerate(_CODE.sub("", text).splitlines(), start=1)
    return [
        f"{path.relative_to(ROOT)}, near line {line}: {found[0]!r}: {why}"
        for line, words in prose
        for pattern, why in HARD.items()
        for found in re.finditer(pattern, " ".join(words.split()), flags=re.IGNORECASE)
    ]


@pytest.mark.parametrize("folder", sorted({path.relative_to(ROOT).parts[0] for path in pages()}))
def test_no_hard_words(folder: str) -> None:
    found = [line for path in pages() if path.relative_to(ROOT).parts[0] == folder for line in hard_words(path)]
    assert not found, "\n".join(found)


def test_the_words_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a docstring, a comment, a message over two lines and a page; not in a name, and not in a page's code."""
    monkeypatch.setattr("tests.test_language.ROOT", tmp_path)
    module = tmp_path / "module.py"
    module.write_text(
        'def made_up(otherwise: int) -> str:\n    """It shall\n    end."""\n'
        '    return f"{otherwise} is no bundle"  # what it is for\n'
    )
    assert [line.split("'")[1] for line in hard_words(module)] == ["shall", "is no bundle", "what it is for"]
    page = tmp_path / "page.md"
    page.write_text("`otherwise` is a name.\n```text\nshall\n```\nA value is said to be made-up.\n")
    assert sorted(line.split("'")[1] for line in hard_words(page)) == ["is said", "made-up"]
