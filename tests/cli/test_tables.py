"""Tables of a terminal: what is cut, what is broken into lines, what is left out, and what is escaped."""

from __future__ import annotations

from typing import Any

import pytest

from dinoexport.cli import catalogue, tables
from dinoexport.cli.escaping import paragraph, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ÿ Ā 𐀀", "plain ÿ Ā 𐀀"), ("\n\r\t", r"\n\r\t"), ("\x00\x0e\x1b[0m\x7f\x9b", r"\x00\x0e\x1b[0m\x7f\x9b"),
        ("\xad", r"\xad"), ("\u202e\uffff", r"\u202e\uffff"), ("\U000e0001", r"\U000e0001"), ("\udc80", r"\udc80"),
    ],
)  # fmt: skip
def test_what_steers_a_terminal_is_shown_by_its_code(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_of_a_paragraph_stay_lines() -> None:
    assert paragraph("one\ntwo\r\nthree") == "one\n  two\\r\n  three"


ROW: dict[str, Any] = {"variant": "tiny", "licence": "Apache 2.0", "image size": [224, 518], "bytes": 1_234_567}


def test_only_the_first_column_is_kept_whole_or_all_but_the_one_that_is_named() -> None:
    for breaks, whole, headings in (
        (None, [True, False, False, False], ["variant", "licence", "image size", "bytes"]),
        ("licence", [True, False, True, True], ["variant", "licence", "image\nsize", "bytes"]),
    ):
        made = tables.table("Title", [ROW], breaks=breaks)
        assert [column.no_wrap for column in made.columns] == whole
        assert [str(column.header) for column in made.columns] == headings
        assert [[str(text) for text in column.cells] for column in made.columns] == [
            ["tiny"], ["Apache 2.0"], ["224, 518"], ["1,234,567"]
        ]  # fmt: skip
    assert tables.cell(None) == "-"


VARIANT: dict[str, Any] = {
    "variant": "tiny",
    "licence": "Apache 2.0 (with remarks)",
    "image_size": 518,
    "tensor_bytes": 1_234_567,
    "none": None,
}


@pytest.mark.parametrize(
    ("columns", "shown", "title"),
    [
        # 10 for `variant`, 10 for `licence`, 8 for `image`, 12 for 1,234,567, and the last line
        (41, ["variant", "licence", "image size", "tensor bytes"], "Variants"),
        (40, ["variant", "licence", "image size"], "Variants (more with --json: tensor bytes)"),
        (29, ["variant", "licence", "image size"], "Variants (more with --json: tensor bytes)"),
        (28, ["variant", "licence"], "Variants (more with --json: image size, tensor bytes)"),
    ],
)
def test_a_table_that_is_too_wide_leaves_out_the_last_facts_and_names_them(
    columns: int, shown: list[str], title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_COMMON", ("variant", "licence"))
    ((told, (row,)),) = catalogue.variant_tables([VARIANT], columns)
    assert (told, list(row)) == (title, shown)
    assert row["licence"] == "Apache 2.0"
    assert catalogue._width([row], shown) <= columns


def test_a_long_licence_breaks_and_a_long_name_does_not() -> None:
    assert catalogue._width([{"licence": "one two threefour"}], ["licence"]) == 1 + 3 + 9
    assert catalogue._width([{"variant": "one two threefour"}], ["variant"]) == 1 + 3 + 17
