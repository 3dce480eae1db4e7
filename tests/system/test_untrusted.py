"""Files that somebody else wrote: which are opened, and how much of them is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoexport.errors import BuildError, DinoexportError, MissingRequirement
from dinoexport.system import files, untrusted


def test_a_file_of_the_largest_size_is_read_and_no_larger_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"123456")
    assert untrusted.read_bytes(file, max_bytes=6) == b"123456"
    with pytest.raises(untrusted.Unreadable) as caught:
        untrusted.read_bytes(file, max_bytes=5)
    assert caught.value.problem == "it has 6 bytes or more, and no such file has more than 5"
    assert (caught.value.is_link, caught.value.absent) == (False, False)


def test_a_file_that_reports_no_size_is_read_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those in /proc do."""
    file = tmp_path / "file"
    file.write_bytes(b"123456")
    monkeypatch.setattr(untrusted, "_check", lambda *_: None)
    assert untrusted.read_bytes(file, max_bytes=6) == b"123456"
    with pytest.raises(untrusted.Unreadable) as caught:
        untrusted.read_bytes(file, max_bytes=5)
    assert caught.value.problem == "it has 6 bytes or more, and no such file has more than 5"


def test_links_are_followed_unless_they_may_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    link = tmp_path / "link"
    link.symlink_to("file")
    with untrusted.opened(link) as opened:
        assert opened.read() == b"text"
    assert untrusted.read_bytes(link, max_bytes=9) == b"text" and untrusted.read_text(link, max_bytes=9) == "text"
    assert untrusted.is_regular(link) and not untrusted.is_regular(link, links=False)
    for read in (untrusted.read_bytes, untrusted.read_text):
        with pytest.raises(untrusted.Unreadable) as caught:
            read(link, max_bytes=9, links=False)
        assert (caught.value.is_link, caught.value.absent) == (True, False)
    with pytest.raises(untrusted.Unreadable) as caught:
        untrusted.read_bytes(tmp_path / "none", max_bytes=9)
    assert (caught.value.is_link, caught.value.absent) == (False, True)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(28, "No space left"), MissingRequirement, "No room left while writing to out: No space left."),
        (
            OSError("9 requested and 5 written"),
            MissingRequirement,
            "No room left while writing to out: 9 requested and",
        ),
        (OSError("something else"), BuildError, "Writing to out failed: something else."),
        (OSError(5, "9 requested and 5 written"), BuildError, "Writing to out failed: [Errno 5] 9 requested and"),
        (OSError(13, "Permission denied"), MissingRequirement, "out cannot be written: Permission denied."),
    ],
)
def test_a_fault_of_the_disk_is_one_sentence(error: OSError, kind: type[DinoexportError], message: str) -> None:
    with pytest.raises(kind) as caught, files.disk_errors(Path("out")):
        raise error
    assert caught.value.message.removesuffix(" 5 written.") == message
