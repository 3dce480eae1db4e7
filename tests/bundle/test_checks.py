"""A bundle that is held: what is used is what was checked, or a failure."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dinoexport import bundle
from dinoexport.errors import BuildError, ValidationFailed
from dinoexport.system import changes, untrusted


def rewritten(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(b"other")
    path.write_bytes(content)


def there_and_back(path: Path) -> None:
    away = path.with_name("away")
    path.rename(away)
    path.write_bytes(b"other")
    path.unlink()
    away.rename(path)


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)


@pytest.mark.parametrize("change", [rewritten, there_and_back, replaced, Path.unlink])
def test_a_file_changed_while_it_is_used_is_noticed(small: Path, change: Callable[[Path], object]) -> None:
    """Also one that is what it was again: in between a runtime may have read another."""
    with pytest.raises(ValidationFailed, match="changed or replaced"), bundle.checked(small, graphs=False):
        change(small / "model.onnx.data")


def test_what_is_left_alone_passes(small: Path) -> None:
    with bundle.checked(small, graphs=False) as held:
        assert held.verdict == "passed"
        (small / "model.onnx.data").read_bytes()


def test_nobody_changes_it_meanwhile(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "WAIT_S", 0.1)
    with bundle.checked(small, graphs=False) as held, pytest.raises(BuildError, match="reading"):
        bundle.rewrite(small, before=held, after=held.changed(target="other"))


def test_graphs_are_inspected_unless_they_are_only_counted(small: Path) -> None:
    """`verify` compares bytes; whoever will run a graph looks into it first, by default."""
    assert bundle.verify(small).verdict == "passed"
    with pytest.raises(ValidationFailed, match=r"model\.onnx is not from dinoexport"), bundle.checked(small):
        pass


def test_a_link_to_the_very_file_is_another_one(small: Path) -> None:
    """Whoever can exchange a link can do it again after this look."""
    away = small.parent / "away"
    (small / "model.onnx.data").rename(away)
    (small / "model.onnx.data").hardlink_to(away)
    seen = bundle.check_files(small, bundle.read_manifest(small).files)
    bundle.check_same(small, seen)
    (small / "model.onnx.data").rename(small.parent / "kept")
    (small / "model.onnx.data").symlink_to(small.parent / "kept")
    seen["model.onnx.data"] = identity(away)
    with pytest.raises(ValidationFailed, match="changed or replaced"):
        bundle.check_same(small, seen)


def identity(path: Path) -> untrusted.Identity:
    with untrusted.opened(path) as file:
        return untrusted.identity(file)
