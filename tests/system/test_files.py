"""Files that are copied, and files that the user named: by the kernel or without it, and never over another's file."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dinoexport.errors import UsageError
from dinoexport.system import files, untrusted

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def halfway(error: int) -> Any:
    """The kernel's copy, which gives up after the first bytes."""
    copied: list[int] = []

    def copy_file_range(found: int, made: int, _nbytes: int) -> int:
        if copied:
            raise OSError(error, os.strerror(error))
        copied.append(os.write(made, b"wrong" * 2000))
        os.read(found, 100)
        return 100

    return copy_file_range


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def test_a_copy_has_the_content_and_its_hash(source: Path, tmp_path: Path) -> None:
    assert files.copy(source, tmp_path / "copy", sha256=SHA256, size_bytes=len(CONTENT)) == SHA256
    assert (tmp_path / "copy").read_bytes() == CONTENT
    with pytest.raises(FileExistsError):
        files.copy(source, tmp_path / "copy")


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_what_the_kernel_gives_up_is_copied_from_the_beginning(
    error: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", halfway(error))
    assert files.copy(source, tmp_path / "copy") == SHA256
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_any_other_fault_of_the_kernels_copy_is_an_error_and_a_system_without_it_copies_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", halfway(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        files.copy(source, tmp_path / "broken")
    monkeypatch.delattr(os, "copy_file_range")
    assert files.copy(source, tmp_path / "copy") == SHA256


def test_a_copy_of_another_size_is_not_begun_and_one_of_another_hash_is_removed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^source has 5120 bytes, not 5119$"):
        files.copy(source, tmp_path / "copy", size_bytes=5119)
    with pytest.raises(ValueError, match=r"^source does not have the SHA-256 0123$"):
        files.copy(source, tmp_path / "copy", sha256="0123")
    (tmp_path / "link").symlink_to("source")
    with pytest.raises(untrusted.Unreadable, match="a link"):
        files.copy(tmp_path / "link", tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "source"]


def test_only_a_file_of_ours_is_written_over(tmp_path: Path) -> None:
    page, theirs = tmp_path / "page", tmp_path / "theirs"
    before = os.umask(0o022)
    try:
        files.write_output(page, b"made by us", ours=b"by us")
    finally:
        os.umask(before)
    assert page.stat().st_mode & 0o777 == 0o644
    files.write_output(page, b"again by us", ours=b"by us")
    assert page.read_bytes() == b"again by us"
    page.write_bytes(bytes((1 << 16) - 5) + b"by us")
    files.check_output(page, ours=b"by us")
    page.write_bytes(bytes((1 << 16) - 4) + b"by us")
    theirs.write_bytes(b"thesis")
    (tmp_path / "link").symlink_to("page")
    for path, why in (
        (page, "was not written by dinoexport"),
        (theirs, "was not written by dinoexport"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "link", "is not a regular file"),
        (tmp_path / "none" / "page", "its folder does not exist"),
        (theirs / "page", "cannot be a file"),
    ):
        with pytest.raises(UsageError, match=why):
            files.write_output(path, b"by us", ours=b"by us")
    assert theirs.read_bytes() == b"thesis"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "page", "theirs"]


def test_a_long_name_leaves_room_for_that_of_the_unfinished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which nobody else may read until it is complete."""
    made, masks, mkstemp, umask = [], [], tempfile.mkstemp, os.umask

    def noted(*, prefix: str, suffix: str, dir: Path) -> Any:  # noqa: A002 (the name that it has)
        made.append((prefix, suffix, dir))
        return mkstemp(prefix=prefix, suffix=suffix, dir=dir)

    monkeypatch.setattr(tempfile, "mkstemp", noted)
    monkeypatch.setattr(os, "umask", lambda mask: masks.append(mask) or umask(mask))
    files.write_output(tmp_path / ("n" * 250), b"by us", ours=b"by us")
    assert (tmp_path / ("n" * 250)).read_bytes() == b"by us"
    assert made == [(f".{'n' * 100}.", ".partial", tmp_path)] and masks[0] == 0o077


def test_a_file_that_becomes_a_link_while_it_is_checked_is_not_followed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("source")
    monkeypatch.setattr(os, "lstat", lambda _path: source.stat())
    with pytest.raises(untrusted.Unreadable, match="it is a link"):
        files.check_output(tmp_path / "link", ours=CONTENT[:9])


def test_a_hash_is_of_the_file_behind_a_link_unless_links_are_refused(source: Path, tmp_path: Path) -> None:
    """What was read of how much is told after each piece."""
    (tmp_path / "link").symlink_to("source")
    steps: list[Any] = []
    assert files.sha256(tmp_path / "link", progress=lambda *step: steps.append(step)) == SHA256
    assert steps == [("hashing link", 5120, 5120)]
    with pytest.raises(untrusted.Unreadable, match="a link"):
        files.sha256(tmp_path / "link", links=False)


@pytest.mark.parametrize(
    ("error", "why"), [(OSError(5, "Input/output error"), "Input/output error"), (OSError("in words"), "in words")]
)
def test_a_disk_that_fails_while_it_is_hashed_is_one_error(
    error: OSError, why: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(files, "sha256_of", fails)
    with pytest.raises(untrusted.Unreadable) as refused:
        files.sha256(source)
    assert refused.value.problem == why
