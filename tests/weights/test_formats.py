"""Opened weight files: what an error lists, the limits of what is opened, and how files of several parts are joined."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoexport.errors import UsageError, WeightsError
from dinoexport.family import Shapes
from dinoexport.spec import Array
from dinoexport.weights import config_file, formats, pickle_check, shards, unusable
from tests.checkpoint_files import save_pth, save_safetensors


@pytest.mark.parametrize(
    ("tops", "listed"),
    [
        ("b", "b"),
        ("bcdefghi", "b, c, d, e, f, g, h, i"),
        ("bcdefghij", "b, c, d, e, f, g, h, i and 1 more"),
        ("bcdefghijkl", "b, c, d, e, f, g, h, i and 3 more"),
    ],
)
def test_a_prefix_that_no_tensor_has(tops: str, listed: str, tmp_path: Path) -> None:
    state = {f"{top}.{part}": torch.zeros(1) for top in tops for part in ("x", "b.y")}
    path = save_safetensors(tmp_path / "w.safetensors", state)
    with pytest.raises(WeightsError) as caught:
        formats.opened((path,), prefix="a")
    assert caught.value.message == f"{path} has no tensors under 'a'."
    assert caught.value.next_step == f"At its top are {listed}; see --prefix."
    found, read = formats.opened((path,), prefix="b")
    assert set(found) == {"x", "b.y"} and read("b.y").tolist() == [0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_files_without_tensors_are_named_or_their_folder(count: int, tmp_path: Path) -> None:
    paths = tuple(save_safetensors(tmp_path / f"{i}.safetensors", {}) for i in range(count))
    with pytest.raises(WeightsError) as caught:
        formats.opened(paths)
    shown = str(tmp_path) if count == 3 else ", ".join(map(str, paths))
    assert caught.value.message == f"{shown} holds no tensors."


def test_all_kinds_of_numbers_in_one_file_are_read_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of fp32 without a copy: both readings are of the mapped file."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    state = {str(dtype): torch.tensor([1.5, -2.0], dtype=dtype) for dtype in dtypes}
    path = save_safetensors(tmp_path / "w.safetensors", state)
    monkeypatch.setattr(formats, "_of_torch", pytest.fail)
    _, read = formats.opened((path,))
    assert all(read(name).tolist() == [1.5, -2.0] and read(name).dtype == np.float32 for name in state)
    assert np.shares_memory(read("torch.float32"), read("torch.float32"))


@pytest.mark.parametrize(("room", "taken"), [(0, True), (-1, False)])
def test_the_largest_pickle(room: int, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_pth(tmp_path / "w.pth", {"a": torch.ones(2)})
    with zipfile.ZipFile(path) as archive:
        (size,) = (entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    monkeypatch.setattr(pickle_check, "MAX_BYTES", size + room)
    if taken:
        assert formats.opened((path,))[0] == {"a": (2,)}
    else:
        with pytest.raises(WeightsError, match="it is larger than any real one"):
            formats.opened((path,))


@pytest.mark.parametrize(("entries", "deep", "taken"), [(3, 7, True), (4, 7, False), (3, 8, False)])
def test_the_most_entries_and_the_deepest_dict(
    entries: int, deep: int, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_ENTRIES_MAX", 3)
    content: dict[str, Any] = {f"{i}": torch.ones(1) for i in range(entries)}
    for _ in range(deep - 1):
        content = {"in": content}
    path = save_pth(tmp_path / "w.pth", content)
    if taken:
        assert set(formats.opened((path,))[0]) == {"in." * (deep - 1) + f"{i}" for i in range(entries)}
    else:
        with pytest.raises(WeightsError, match="dicts more than 8 deep or of more than 3 entries"):
            formats.opened((path,))


@pytest.mark.parametrize("more", [0, 1])
def test_a_checkpoint_has_at_most_200_000_entries(more: int) -> None:
    content = {"of": 0, "a": dict.fromkeys(range(200_000 + more))}
    if more:
        with pytest.raises(ValueError, match="dicts more than 8 deep or of more than 200000 entries"):
            formats._tensors(content, float)
    else:
        assert formats._tensors(content, int) == {"of": 0}


def test_a_file_is_mapped_again_after_16_mib() -> None:
    """Whose last tensor may go beyond them."""
    mapped: list[str] = []
    sizes = {"a": 2**22, "b": 1, "c": 1}

    def mapping() -> Callable[[str], Array]:
        mapped.append("again")
        return lambda name: mapped.append(name) or np.empty(sizes[name], np.float32)  # type: ignore[func-returns-value]

    read = formats._reader(Path("w"), mapping, formats._widened)
    for name in "abc":
        read(name)
    assert mapped == ["again", "a", "b", "again", "c"]


def test_an_index_has_at_most_64_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def read_bytes(path: Path, *, max_bytes: int) -> bytes:
        asked.append((path.name, max_bytes))
        return b'{"weight_map": {"a": "m.bin", "b": "n.bin"}}'

    (tmp_path / "m.index.json").touch()
    monkeypatch.setattr(unusable.untrusted, "read_bytes", read_bytes)
    with pytest.raises(WeightsError, match=r"lacks n\.bin of its checkpoint"):
        unusable.check_parts(tmp_path, [tmp_path / "m.bin"])
    assert asked == [("m.index.json", 67_108_864)]


def test_a_pickle_has_at_most_64_mib(tmp_path: Path) -> None:
    """As its zip says, before a byte of it is unpacked."""
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", bytes(2**26 + 1))
    with pytest.raises(WeightsError, match="it is larger than any real one"):
        formats.opened((path,))


def test_a_file_is_mapped_again_after_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 bytes each: the fourth is the first to find more than 16 bytes read, and so on."""
    monkeypatch.setattr(formats, "_MAPPED_BYTES_MAX", 16)
    mapped: list[str] = []

    def mapping() -> Callable[[str], Array]:
        mapped.append("again")
        return lambda name: mapped.append(name) or np.zeros(2, np.float32)  # type: ignore[func-returns-value]

    read = formats._reader(Path("w"), mapping, formats._widened)
    for name in "abcdefg":
        read(name)
    assert mapped == ["again", *"abc", "again", *"def", "again", "g"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Unsupported operand 149. Set weights_only=False", "it holds objects that are neither tensors nor settings"),
        ("some advice\nWeightsUnpickler error: Unsupported operand 149 \n more", "Unsupported operand 149 "),
        ("", "Exception"),
    ],
)
def test_torch_s_advice_is_left_out(said: str, reason: str) -> None:
    assert formats._reason(Exception(said)) == reason


# Several files


def parts(**files: dict[str, Array]) -> dict[Path, tuple[Shapes, Callable[[str], Array]]]:
    return {
        Path(file): ({name: array.shape for name, array in tensors.items()}, tensors.__getitem__)
        for file, tensors in files.items()
    }


GRID = np.arange(12.0).reshape(4, 3)


def test_parts_are_joined_and_copies_are_one() -> None:
    opened = parts(
        one={"rows": GRID[:1], "columns": GRID[:, :2], "norm": GRID[0], "own": GRID},
        two={"rows": GRID[1:], "columns": GRID[:, 2:], "norm": GRID[0]},
    )
    found, read = shards.merged(opened, {"rows": (4, 3), "columns": (4, 3), "norm": (3,), "own": (4, 3)})
    assert found == {"rows": (4, 3), "columns": (4, 3), "norm": (3,), "own": (4, 3)}
    assert all(np.array_equal(read(name), GRID[0] if name == "norm" else GRID) for name in found)
    found, read = shards.merged(opened, {}, {"rows": 0, "columns": 1, "norm": None}.get)
    assert found["rows"] == found["columns"] == (4, 3) and found["norm"] == (3,)


@pytest.mark.parametrize(
    ("one", "two", "problem"),
    [
        ({"a": GRID}, {"a": GRID}, "two and one both hold a: they are not parts of one checkpoint."),
        ({"a": GRID}, {"a": GRID[:1]}, "a is [(4, 3), (1, 3)] in 2 files, which do not make (4, 3): a file is"),
        ({"a": GRID[:2]}, {"a": GRID[:1]}, "a is [(2, 3), (1, 3)] in 2 files, which do not make (4, 3): a file is"),
        # Beside a tensor in parts, a copy has the same shape in each file.
        ({"a": GRID[:1], "b": GRID[0]}, {"a": GRID[1:], "b": GRID[0, :2]}, "two and one both hold b: they are not"),
    ],
)
def test_files_that_are_not_of_one_checkpoint(one: dict[str, Array], two: dict[str, Array], problem: str) -> None:
    with pytest.raises(WeightsError) as caught:
        shards.merged(parts(one=one, two=two), {"a": (4, 3)})
    assert caught.value.message.startswith(problem)


def test_copies_that_differ_are_named_with_two_files() -> None:
    opened = parts(one={"a": GRID[:1], "b": GRID[0]}, two={"a": GRID[1:], "b": GRID[1]})
    _, read = shards.merged(opened, {"a": (4, 3), "b": (3,)})
    with pytest.raises(WeightsError, match="one and two hold different copies of b"):
        read("b")


@pytest.mark.parametrize(
    ("there", "lacks"),
    [
        (("m-00001-of-00002.bin",), "m-00002-of-00002.bin"),
        (("m-00001-of-00003.bin",), "m-00002-of-00003.bin and 1 more"),
        (("m-00003-of-00004.bin",), "m-00001-of-00004.bin and 2 more"),
        (("m-00001-of-00002.bin", "m-00002-of-00002.bin"), ""),
        (("m.bin",), ""),
    ],
)
def test_numbered_files_that_are_missing(there: tuple[str, ...], lacks: str, tmp_path: Path) -> None:
    check = functools.partial(unusable.check_parts, tmp_path, [tmp_path / name for name in there])
    if not lacks:
        check()
        return
    with pytest.raises(WeightsError) as caught:
        check()
    assert caught.value.message == f"{tmp_path} lacks {lacks} of its checkpoint."


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        (["w/models/model.json", "w/data/0"], "a program of torch.export"),
        (["w/models/model.txt", "w/settings.json"], ""),
        (["w/code/a.py"], "a TorchScript program"),
        (["w/constants.pkl"], "a TorchScript program"),
    ],
)
def test_programs_by_the_names_in_their_zip(entries: list[str], kind: str) -> None:
    if not kind:
        unusable.check_entries(entries, Path("w.pth"))
        return
    with pytest.raises(WeightsError, match=f"w.pth is {kind}, not a state dict"):
        unusable.check_entries(entries, Path("w.pth"))


def test_an_adapter_beside_its_model_is_none(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(WeightsError, match="holds an adapter without its model"):
        unusable.check_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()
    unusable.check_folder(tmp_path)


# The small files beside them


def test_a_configuration_up_to_a_mebibyte_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}'.ljust(1 << 20))
    read = config_file.read_json(path)
    assert read is not None and read.content == {"a": 1}
    path.write_bytes(b'{"a": 1}'.ljust((1 << 20) + 1))
    assert config_file.read_json(path) is None
    assert config_file.read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("mine/My Model.v2.pth", "my-model-v2"),
        ("mine/model.safetensors", "mine"),
        ("My_Own/teacher_checkpoint.pth", "my_own"),
        ("model/weights.pth", "mine"),
        ("mine/---.pth", "mine"),
        ("---/___.pth", "mine"),
        (f"mine/{'a' * 63}.pth", "a" * 63),
        (f"mine/{'a' * 65}.pth", "a" * 64),
    ],
)
def test_names_of_models_by_their_files(path: str, name: str, tmp_path: Path) -> None:
    assert config_file.name_of(tmp_path / path) == name


def test_a_value_of_another_kind_is_named(tmp_path: Path) -> None:
    config = config_file.Config(tmp_path / "c.json", {"on": True, "size": 3})
    assert config.get("on", bool) is True and config.get("size", int) == 3 and config.get("none", int) is None
    for key, kind in (("on", int), ("size", bool), ("size", str)):
        with pytest.raises(UsageError, match=f"c.json: {key} is .*, which makes no sense"):
            config.get(key, kind)
