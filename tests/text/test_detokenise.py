"""Text as it becomes certain: what is held back, and what is shown at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoexport.text import tokenizer
from dinoexport.text.detokenise import Detokeniser, StopStrings
from tests.text import tiny


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "rest"),
    [
        ((), ("one", "", "two"), ["one", "", "two"], ""),
        (("ab",), ("x", "xa", "c", "a"), ["x", "x", "ac", ""], "a"),
        (("abab",), ("ab", "a", "c"), ["", "", "abac"], ""),
        (("abab",), ("aba", "b", "more"), ["", "", ""], ""),
        (("abc", "bd"), ("xab", "d"), ["x", "a"], ""),
        (("abcd",), ("xxab", "cd"), ["xx", ""], ""),
        (("END", "E"), ("yE", "ND"), ["y", ""], ""),
        (("aa",), ("ba", "aa"), ["b", ""], ""),
        (("a",), ("bab", "c"), ["b", ""], ""),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(
    stops: tuple[str, ...], pieces: tuple[str, ...], shown: list[str], rest: str
) -> None:
    found = StopStrings(stops)
    assert [found.push(piece) for piece in pieces] == shown
    assert found.finish() == rest and found.finish() == ""


def test_a_character_is_shown_when_all_its_bytes_are_there(tmp_path: Path) -> None:
    """Control tokens add nothing, and what never becomes a character is shown at the end."""
    words = tokenizer.load(tiny.tokenizer_json(tmp_path))
    detokeniser = Detokeniser(words, continuing=True)
    ids = [*words.encode("é"), words.size - 1, *words.encode("a🙂")]
    assert [detokeniser.push(token_id) for token_id in ids] == ["", "é", "", "a", "", "", "", "🙂"]
    assert detokeniser.finish() == ""
    assert [detokeniser.push(token_id) for token_id in words.encode("🙂")[:2]] == ["", ""]
    assert detokeniser.finish() == "�" and detokeniser.finish() == ""
