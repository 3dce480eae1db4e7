"""What can be embedded: what is listed, in which order, how it is read, and why it is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dinoexport.embed import sources
from dinoexport.embed.sources import Unusable, open_source
from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.system import store


def read(source: Any, *names: str) -> dict[str, bytes | str]:
    """The bytes of each item, or why there are none."""
    found: dict[str, bytes | str] = {}
    for name, reader in source.readers(names):
        try:
            found[name] = reader()
        except Unusable as error:
            found[name] = str(error)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files, links and others, and one beside it whose name begins alike."""
    inside = tmp_path / "in"
    for name in ("b.jpg", "sub/a.PNG", "sub/.hidden/x.png", ".hidden.png", "z.txt"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(name.encode())
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "secret.png").write_bytes(b"secret")
    links = {
        "gone.png": "nowhere.png", "out.png": "../inner/secret.png", "outer.png": "../inner/nowhere.png",
        "in.png": "b.jpg", "folder.png": "sub", "itself.png": "itself.png",
    }  # fmt: skip
    for name, target in links.items():
        (inside / name).symlink_to(target)
    os.mkfifo(inside / "pipe.png")
    return inside


def test_a_folder_is_listed_by_name(folder: Path) -> None:
    items = list(open_source(str(folder)).items())
    assert [item.name for item in items] == [
        "b.jpg", "folder.png", "gone.png", "in.png", "itself.png", "out.png", "outer.png", "pipe.png", "sub/a.PNG",
        "z.txt",
    ]  # fmt: skip
    assert all(item.key == item.name for item in items) and items[0].size_bytes == 5


def test_files_are_read_or_refused_in_words_that_name_no_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that leads out says nothing of what is there, unless nothing is."""
    source = open_source(str(folder))
    monkeypatch.setattr(sources, "_ITEM_MAX_BYTES", 9)
    (folder / "large.png").write_bytes(b"0123456789")
    wanted = {
        "b.jpg": b"b.jpg", "in.png": b"b.jpg", "sub/a.PNG": b"sub/a.PNG", "z.txt": "not an image by its name",
        "gone.png": "a link to nothing", "outer.png": "a link to nothing", "later.png": "no longer there",
        "out.png": "a link that leads out of the folder", "folder.png": "a link to a folder",
        "itself.png": "a link to itself", "pipe.png": "not a regular file",
        "b.jpg/x.png": "cannot be read: Not a directory", "large.png": "10 bytes are more than any image's 9",
    }  # fmt: skip
    assert read(source, *wanted) == wanted
    (folder / "large.png").write_bytes(b"012345678")
    assert read(source, "large.png") == {"large.png": b"012345678"}


def test_the_root_folder_contains_everything(folder: Path) -> None:
    name = str(folder / "b.jpg").lstrip("/")
    assert read(sources.LocalFiles(Path("/")), name) == {name: b"b.jpg"}


def test_a_disk_that_fails_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    source = open_source(str(folder))
    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(MissingRequirement, match="cannot be read from: Input/output error"):
        read(source, "b.jpg")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jpg", ["b.jpg"]), ("sub/**/*.PNG", ["a.PNG"]), ("sub/*", ["a.PNG"]), ("[b]*", ["b.jpg"]),
        ("s?b/*.*", ["sub/a.PNG"]), ("*", ["b.jpg", "folder.png", "gone.png", "in.png", "itself.png", "out.png",
                                           "outer.png", "pipe.png", "z.txt"]),
    ],
)  # fmt: skip
def test_a_pattern_names_items_below_its_fixed_part(pattern: str, names: list[str], folder: Path) -> None:
    source = open_source(f"{folder}/{pattern}")
    assert [item.name for item in source.items()] == names
    assert source.samples == (folder / "sub" if pattern.startswith("sub/") else folder)
    assert read(source, names[0])[names[0]] in (b"b.jpg", b"sub/a.PNG")


def test_a_pattern_in_this_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [item.name for item in open_source("*.jpg").items()] == ["b.jpg"]


@pytest.mark.parametrize("place", ["nowhere", "b.jpg"])
def test_no_folder(place: str, folder: Path) -> None:
    with pytest.raises(UsageError, match="There is no folder"):
        open_source(str(folder / place))


@pytest.mark.parametrize(
    ("images", "column"),
    [
        ("a.parquet", ("a.parquet", "")), ("a.parquet:image", ("a.parquet", "image")), ("a:b", ("a:b", None)),
        ("s3://b/c.parquet:d", ("s3://b/c.parquet", "d")), ("s3://b/c", ("s3://b/c", None)),
        ("*.parquet:", ("*.parquet", "")), (":x", (":x", None)),
    ],
)  # fmt: skip
def test_a_column_is_named_behind_the_file(images: str, column: tuple[str, str | None]) -> None:
    assert sources._column_of(images) == column


class Objects:
    """An object store in memory."""

    def files(self) -> list[tuple[str, int]]:
        return [("z.png", 2), ("a/b.jpg", 3), (".x/c.png", 1), ("a/.d.png", 1), ("e.txt", 1), ("huge.png", 1)]

    def read(self, name: str, *, max_bytes: int) -> bytes:
        assert max_bytes == 1 << 28
        if name == "huge.png":
            raise ValueError(name)
        if name == "gone.png":
            raise FileNotFoundError(name)
        return name.encode()


def test_objects_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "open_place", lambda _url: Objects())
    source = open_source("s3://bucket/images")
    assert [(item.name, item.size_bytes, item.key) for item in source.items()] == [
        ("a/b.jpg", 3, "a/b.jpg"), ("e.txt", 1, "e.txt"), ("huge.png", 1, "huge.png"), ("z.png", 2, "z.png"),
    ]  # fmt: skip
    assert source.samples is None
    wanted: dict[str, bytes | str] = {
        "z.png": b"z.png", "e.txt": "not an image by its name", "gone.png": "no longer there",
        "huge.png": "more than any image's 268435456 bytes",
    }  # fmt: skip
    assert read(source, *wanted) == wanted


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Two files of five and two rows, in groups of two: a column of bytes, one of Hugging Face's structs, a number."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, count in (("a", 5), ("b", 2)):
        rows = [f"{name}{i}".encode() for i in range(count)]
        content = {
            "raw": pa.array([*rows[:-1], None], pa.large_binary()),
            "image": pa.array([{"bytes": row, "path": "x"} for row in rows]),
            "number": list(range(count)),
        }
        pq.write_table(pa.table(content), tmp_path / f"{name}.parquet", row_group_size=2)
    return tmp_path


def test_rows_of_parquet_are_items(parquet: Path) -> None:
    source = open_source(f"{parquet}/*.parquet:raw")
    items = list(source.items())
    assert [(item.name, item.key) for item in items] == [
        ("a.parquet#0", "a.parquet#0"), ("a.parquet#1", "a.parquet#0"), ("a.parquet#2", "a.parquet#1"),
        ("a.parquet#3", "a.parquet#1"), ("a.parquet#4", "a.parquet#2"), ("b.parquet#0", "b.parquet#0"),
        ("b.parquet#1", "b.parquet#0"),
    ]  # fmt: skip
    assert all(item.size_bytes > 0 for item in items) and source.samples is None
    assert read(source, "a.parquet#1", "a.parquet#2", "a.parquet#3", "a.parquet#4", "b.parquet#0") == {
        "a.parquet#1": b"a1", "a.parquet#2": b"a2", "a.parquet#3": b"a3",
        "a.parquet#4": "the column holds nothing in this row", "b.parquet#0": b"b0",
    }  # fmt: skip
    structs = open_source(f"{parquet}/a.parquet:image")
    assert read(structs, "a.parquet#0", "a.parquet#4") == {"a.parquet#0": b"a0", "a.parquet#4": b"a4"}
    with pytest.raises(UsageError, match=r"c\.parquet of the plan does not exist"):
        read(structs, "c.parquet#0")


def test_a_row_group_is_read_once_and_only_its_column(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = open_source(f"{parquet}/a.parquet:raw")
    file, asked = source._files["a.parquet"], []

    class Counting:
        metadata = file.metadata

        def read_row_group(self, index: int, *, columns: list[str]) -> Any:
            asked.append((index, columns))
            return file.read_row_group(index, columns=columns)

    monkeypatch.setitem(source._files, "a.parquet", Counting())
    read(source, *(f"a.parquet#{row}" for row in (0, 1, 3, 4)))
    assert asked == [(0, ["raw"]), (1, ["raw"]), (2, ["raw"])]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("a.parquet", "2 could: raw, image"), ("a.parquet:number", "no column 'number' of encoded images"),
        ("a.parquet:none", "no column 'none'"), ("c.parquet", "no Parquet file"), ("c*.parquet", "no Parquet file"),
        ("[ac].parquet:raw", "not a readable Parquet file"),
        ("**/a.parquet:raw", "Two of the Parquet files have one name"),
    ],
)  # fmt: skip
def test_columns_that_are_refused(images: str, words: str, parquet: Path) -> None:
    if "ac" in images:
        (parquet / "c.parquet").write_bytes(b"PAR1 no")
    if "**" in images:
        (parquet / "sub").mkdir()
        (parquet / "sub" / "a.parquet").write_bytes((parquet / "a.parquet").read_bytes())
    with pytest.raises(UsageError, match=words.replace(".", r"\.")):
        open_source(f"{parquet}/{images}")


def test_parquet_in_a_store_is_refused() -> None:
    with pytest.raises(UsageError, match="from a local disk only"):
        open_source("s3://bucket/a.parquet:raw")


def test_the_only_column_of_bytes_need_not_be_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": [1], "raw": [b"x"]}), tmp_path / "a.parquet")
    assert read(open_source(str(tmp_path / "a.parquet")), "a.parquet#0") == {"a.parquet#0": b"x"}
    pq.write_table(pa.table({"n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="0 could: none is binary"):
        open_source(str(tmp_path / "b.parquet"))


def test_a_row_is_as_large_as_the_mean_of_its_group(tmp_path: Path) -> None:
    """The footer has no lengths of single rows."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"raw": [b"x" * 100, b"y" * 300, b"z" * 1000]}), path, row_group_size=2)
    metadata = pq.ParquetFile(path).metadata
    sizes = [metadata.row_group(i).total_byte_size for i in (0, 1)]
    assert [item.size_bytes for item in open_source(str(path)).items()] == [sizes[0] // 2, sizes[0] // 2, sizes[1]]
    assert sizes[0] > 400 and sizes[1] > 1000


def test_only_bytes_named_so_make_a_column_of_images(tmp_path: Path) -> None:
    """Of columns with parts, as data sets of Hugging Face have them."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, column in (("a", {"bytes": b"x", "path": "y"}), ("b", {"bytes": 5}), ("c", {"data": b"x"})):
        pq.write_table(pa.table({"image": [column]}), tmp_path / f"{name}.parquet")
    assert read(open_source(str(tmp_path / "a.parquet")), "a.parquet#0") == {"a.parquet#0": b"x"}
    for name in "bc":
        with pytest.raises(UsageError, match="0 could: none is binary"):
            open_source(str(tmp_path / f"{name}.parquet"))
