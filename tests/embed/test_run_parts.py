"""How a run is divided, what it is by default, and what is told of its progress."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.embed import embedder, local, plan, run
from dinoexport.embed.local import ShardTask
from dinoexport.embed.plan import Settings
from dinoexport.embed.run import State
from dinoexport.embed.sources import Item
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.spec import Dim, Graph, Tensor
from dinoexport.system import store

SETTINGS = Settings(
    images="/photos", model_sha256="0" * 64, variant="tiny", precision="fp32", front_end="images", preparation={},
    outputs=("y",), dtype="float32", normalised=False, batch=5,
)  # fmt: skip


def test_what_a_caller_gets_who_chooses_nothing() -> None:
    options = {name: option.default for name, option in inspect.signature(run.embed).parameters.items()}
    for name in ("folder", "images", "out", "planned", "watch", "progress"):
        del options[name]
    assert options == {
        "size": "default", "outputs": None, "dtype": "float32", "normalised": False, "shards": None, "workers": None,
        "part": (0, 1), "engine": "local", "max_failed": 0.01, "retry_failed": False, "extend": False,
    }  # fmt: skip
    task = ShardTask(plan=None, shard=0, rows=1)  # type: ignore[arg-type]
    assert (task.again, task.deaths, task.known_bad) == (False, 0, {})
    assert (local.DEATHS_MAX, local._STOP_S) == (4, 10)


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("0/1", (0, 1)), ("63/64", (63, 64)), ("007/64", (7, 64)), ("999998/999999", (999998, 999999)),
        ("1/1", None), ("64/64", None), ("0/0", None), ("-1/2", None), ("1", None), ("1/", None), ("1/2/3", None),
        ("0/1000000", None), ("0/1 ", None), ("", None),
    ],
)  # fmt: skip
def test_a_part_counts_from_zero(word: str, part: tuple[int, int] | None) -> None:
    if part is None:
        with pytest.raises(UsageError) as refused:
            run.part_of(word)
        assert refused.value.message == f"--shard {word!r} is not I/N."
    else:
        assert run.part_of(word) == part


@pytest.mark.parametrize(
    ("word", "share"),
    [
        ("1%", 0.01), ("0.01", 0.01), ("100%", 1.0), ("1", 1.0), ("0", 0.0), ("0%", 0.0), (" 2.5% ", 0.025),
        ("101%", None), ("1.01", None), ("-1", None), ("", None), ("%", None), ("1e-2", None), (".5", None),
    ],
)  # fmt: skip
def test_a_share_is_a_fraction_or_per_cent(word: str, share: float | None) -> None:
    if share is None:
        with pytest.raises(UsageError) as refused:
            run.share_of(word)
        assert refused.value.message == f"--max-failed {word!r} is not a share."
    else:
        assert run.share_of(word) == share


@pytest.mark.parametrize(
    ("items", "row_bytes", "workers", "shards"),
    [
        (1, 100, 1, 1), (64, 100, 9, 1), (65, 100, 9, 2), (10_000, 100, 2, 16), (10_000, 100, 100, 157),
        (50_000, 100, 0, 1), (50_001, 100, 0, 2), (1024, 1 << 17, 0, 1), (1025, 1 << 17, 0, 2),
        (10**12, 1000, 0, 100_000),
    ],
)  # fmt: skip
def test_how_many_shards(items: int, row_bytes: int, workers: int, shards: int) -> None:
    """Of 128 MiB and 50,000 rows at most; of 64 at least where eight for each worker would be smaller."""
    assert plan._count(items, row_bytes, workers) == shards


class Listed:
    """So many items, whose keys are their names."""

    samples = None

    def __init__(self, count: int) -> None:
        self.count = count

    def items(self) -> Iterator[Item]:
        return (Item(name=f"i{i:05}", size_bytes=i, key=f"k{i}") for i in range(self.count))


def test_a_long_listing_is_told(tmp_path: Path) -> None:
    told: list[Any] = []
    listing = tmp_path / "listing"
    count, image_bytes, _ = plan._listed(Listed(10_002).items(), listing, lambda *step: told.append(step))
    assert told == [("listing images", 10_000, 0)]
    assert (count, image_bytes) == (10_002, 10_001 * 10_002 // 2)
    lines = listing.read_text().splitlines()
    assert (len(lines), lines[7]) == (10_002, '["i00007", 7, "k7"]')
    names = "".join(json.dumps([f"i{i:05}", f"k{i}"]) for i in range(9))
    digest = hashlib.sha256(names.encode()).hexdigest()
    assert plan.listing_hash(Listed(9), lambda *_: None) == digest  # type: ignore[arg-type]


def made(place: store.LocalPlace, count: int = 9, *, shards: int | None = 4, told: Any = None, **how: Any) -> Any:
    return plan.make(
        Listed(count), place, how.pop("settings", SETTINGS), before=how.pop("before", ()), shards=shards,  # type: ignore[arg-type]
        workers=1, row_bytes=100, progress=told or (lambda *_: None),
    )  # fmt: skip


def test_every_item_is_in_the_list_of_its_key(tmp_path: Path) -> None:
    """A shard without an item has an empty list; each list that is written is told."""
    place = store.LocalPlace(tmp_path)
    told: list[Any] = []
    first = made(place, told=lambda *step: told.append(step))
    assert told == [("writing the plan", i, 4) for i in (1, 2, 3, 4)]
    assert (first.items, first.image_bytes, first.generation, first.shards) == (9, 36, 0, 4)
    named = hashlib.sha256(f"4 {first.listing_sha256} {SETTINGS.model_dump_json()}".encode()).hexdigest()
    assert first.lists == f"0-{named[:12]}"
    digests = [hashlib.blake2b(f"k{i}".encode(), digest_size=8).digest() for i in range(9)]
    for shard in range(4):
        expected = [f"i{i:05}" for i in range(9) if int.from_bytes(digests[i], "big") % 4 == shard]
        assert plan.items_of(place, first, shard) == expected
    assert plan.read_all(place) == (first,)
    assert (tmp_path / "_plan" / "0.json").read_text().startswith('{\n "version": 1,\n "generation": 0,')
    assert made(store.LocalPlace(tmp_path / "one"), 1, shards=None).shards == 1
    assert made(store.LocalPlace(tmp_path / "none"), 0) is None


def test_an_extension_has_what_is_new(tmp_path: Path) -> None:
    place = store.LocalPlace(tmp_path)
    first = made(place)
    assert made(place, before=(first,)) is None
    second = made(place, 12, before=(first,), shards=1)
    assert (second.generation, second.items, second.image_bytes) == (1, 3, 9 + 10 + 11)
    assert sorted(plan.items_of(place, second, 0)) == ["i00009", "i00010", "i00011"]
    third = made(place, 13, before=(first, second), shards=1)
    assert plan.items_of(place, third, 0) == ["i00012"]
    assert plan.read_all(place) == (first, second, third)
    assert [p.part(2) for p in (first, second)] == [
        "part-00002-of-00004.parquet", "extension-1-part-00002-of-00001.parquet",
    ]  # fmt: skip
    plan.refuse_others(second, SETTINGS, 7, place)  # an extension may have other shards


def test_the_plan_that_came_first_counts(tmp_path: Path) -> None:
    """Lists of the one that came too late are removed, unless they are the same."""
    place = store.LocalPlace(tmp_path)
    first = made(place)
    assert made(place) == first and plan.items_of(place, first, 0)
    late = made(place, shards=2, settings=SETTINGS.changed(batch=3))
    assert late == first and len(list((tmp_path / "_plan").rglob("*.jsonl"))) == 4


@pytest.mark.parametrize("text", ["{}", "[", "[3]\nx", '"a"\n3'])
def test_damaged_plans_are_refused(text: str, tmp_path: Path) -> None:
    place = store.LocalPlace(tmp_path)
    first = made(place)
    (tmp_path / first.list_name(1)).write_text(text)
    with pytest.raises(ValidationFailed, match=r"00001\.jsonl is missing or damaged"):
        plan.items_of(place, first, 1)
    (tmp_path / "_plan" / "0.json").write_text(text)
    with pytest.raises(ValidationFailed, match=r"_plan/0\.json is damaged, or of another version: "):
        plan.read_all(place)


class Clock:
    """In place of the module's."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def test_the_rate_is_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    states: list[State] = []
    tasks: Any = [SimpleNamespace(rows=200), SimpleNamespace(rows=300)]
    counter = run._Counter(tasks, states.append)
    counter.ticked(10, 1)
    assert states[-1] == State(rows=10, rows_total=500, failed=1, shards=0, shards_total=2, rate=0.0, left_s=None)
    for seconds, rows, rate in ((20, 40, 2.5), (40, 100, 2.5), (0, 10, 160 / 60), (20, 0, 150 / 80), (1, 0, 110 / 61)):
        clock.now_s += seconds
        counter.ticked(rows, 0)
        assert (states[-1].rate, states[-1].left_s) == pytest.approx((rate, (500 - states[-1].rows) / rate))
    counter.finished(None)  # type: ignore[arg-type]
    assert (states[-1].rows, states[-1].failed, states[-1].shards) == (160, 1, 1)
    clock.now_s += 30
    counter.ticked(350, 2)
    assert (states[-1].rows, states[-1].rows_total, states[-1].left_s, states[-1].failed) == (510, 510, 0.0, 3)
    clock.now_s += 1000
    counter.ticked(-10, -3)  # a worker died with them
    assert (states[-1].rows, states[-1].failed, states[-1].rows_total) == (500, 0, 500)
    assert (states[-1].rate, states[-1].left_s) == (pytest.approx(-0.01), None)


def of_graph(*inputs: Tensor, batch: int = 200) -> Graph:
    return Graph(
        name="model", inputs=inputs, outputs=(Tensor(name="y", dtype="float32", shape=("batch", 3), meaning=""),),
        dims=(Dim(name="batch", min=1, opt=1, max=batch),),
    )  # fmt: skip


PIXELS = Tensor(name="pixels", dtype="float32", shape=("batch", 3, 4, 4), meaning="RGB")
SCALE = Tensor(name="scale", dtype="float32", shape=("batch", 2), meaning="of each")


@pytest.mark.parametrize(
    ("batch", "target", "profiles", "chosen"),
    [
        (200, "cpu", (), 16),
        (7, "cpu", (), 7),
        (200, "a100", (), 64),
        (40, "a100", (), 40),
        (200, "a100", ((32, 128),), 64),
        (200, "cpu", ((32, 48), (20,)), 20),
        (9, "a100", ((32,),), 9),
    ],
)
def test_the_batch_is_what_graph_and_engines_take(
    batch: int, target: str, profiles: tuple[tuple[int, ...], ...], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen on a CPU, 64 on a GPU, and never more than every engine's largest profile."""
    graph = of_graph(PIXELS, batch=batch)
    end = SimpleNamespace(name="images", graph="model", settings={})
    model = SimpleNamespace(graphs=(graph,), front_ends=lambda *_, **__: (end,))
    engines = tuple(
        SimpleNamespace(profiles={str(i): {"pixels": ((1, 3), (2, 3), (most, 3))} for i, most in enumerate(of_one)})
        for of_one in profiles
    )
    monkeypatch.setattr(run, "model_of", lambda _: model)
    facts: Any = SimpleNamespace(
        engines=engines, target=target, files=(), graphs=(), recipe={}, variant="tiny", precision="fp32"
    )
    settings = run._settings(facts, "http://x", "default", None, "float32", False, (), lambda *_: None)
    assert settings.batch == chosen and settings.outputs == ("y",)


def test_the_graph_that_takes_images() -> None:
    text = Graph(name="text", inputs=(SCALE,), outputs=(), dims=())
    image = of_graph(SCALE, PIXELS)
    ends = [SimpleNamespace(graph="text"), SimpleNamespace(graph="model")]
    model: Any = SimpleNamespace(graphs=(text, image), front_ends=lambda *_, **__: ends)
    assert embedder.front_end_graph(model) is image
    model = SimpleNamespace(graphs=(text, image), front_ends=lambda *_, **__: ends[:1])
    with pytest.raises(UsageError) as refused:
        embedder.front_end_graph(model)
    assert refused.value.message == (
        "This bundle's model takes no image files (scale: of each), and embed reads image files."
    )


def test_a_grid_needs_both_sides() -> None:
    """From the steps of the dimensions; none for a graph whose size is fixed."""
    sides = tuple(Dim(name=name, min=1, opt=9, max=99, step=step) for name, step in (("height", 4), ("width", 7)))
    pixels = Tensor(name="pixels", dtype="float32", shape=("batch", 3, "height", "width"), meaning="")
    given = {"pixels": SimpleNamespace(shape=(1, 3, 15, 21))}
    for dims, grid in ((sides, (3, 3)), (sides[:1], None), ((), None)):
        graph = Graph(name="model", inputs=(pixels,), outputs=(), dims=dims)
        prepared = embedder.Prepared(model=None, front_end=None, graph=graph)  # type: ignore[arg-type]
        assert prepared._grid(given) == grid  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "dim", "rows"),
    [(5, 3, 4095), (64, 3, 4096), (5000, 3, 5000), (16, 1 << 20, 16), (17, 3, 4080), (5, 16359, 510)],
)
def test_a_row_group_is_of_whole_batches(batch: int, dim: int, rows: int) -> None:
    """Of 4096 rows and 32 MiB at most, and one batch at least."""
    worker = object.__new__(embedder.Embedder)
    vars(worker).update(
        columns=(SimpleNamespace(width=dim, kind="vector"),), _prepared=SimpleNamespace(graph=of_graph(PIXELS))
    )
    planned: Any = SimpleNamespace(settings=SETTINGS.changed(batch=batch))
    assert worker._group_rows(planned) == rows


def test_a_slow_run_has_an_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a row a second: twice as many seconds are left as rows."""
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    states: list[State] = []
    counter = run._Counter([SimpleNamespace(rows=100)], states.append)  # type: ignore[list-item]
    clock.now_s += 20
    counter.ticked(10, 0)
    assert (states[-1].rate, states[-1].left_s) == (0.5, 180.0)


def test_a_graph_without_a_batch_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = Tensor(name="pixels", dtype="float32", shape=(1, 3, 4, 4), meaning="")
    end = SimpleNamespace(name="images", graph="model", settings={})
    model = SimpleNamespace(graphs=(of_graph(pixels),), front_ends=lambda *_, **__: (end,))
    monkeypatch.setattr(run, "model_of", lambda _: model)
    facts: Any = SimpleNamespace(
        engines=(), target="cpu", files=(), graphs=(), recipe={}, variant="tiny", precision="fp32"
    )
    assert run._settings(facts, "http://x", "default", None, "float32", False, (), lambda *_: None).batch == 1


@pytest.mark.parametrize(("batch", "ahead"), [(1, 3), (2, 6), (5, 15)])
def test_three_batches_are_decoded_ahead(batch: int, ahead: int) -> None:
    """While one runs; in the order of their names, however many threads decode."""
    taken: list[str] = []

    def readers(names: list[str]) -> Iterator[Any]:
        for name in names:
            taken.append(name)
            yield name, None

    asked: Any = SimpleNamespace(
        _source=SimpleNamespace(readers=readers), _settings=SimpleNamespace(batch=batch), _decoders=2,
        _prepared=SimpleNamespace(of=lambda name, _read: embedder.PreparedImage(row=embedder.ImageRow(name=name))),
    )  # fmt: skip
    names = [str(i) for i in range(40)]
    items = embedder.Embedder._items(asked, names, {}, None)
    assert next(items).row.name == "0" and len(taken) == ahead + 1
    assert [item.row.name for item in items] == names[1:]
