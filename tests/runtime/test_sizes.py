"""Forms of one size: when they are made, that nobody waits, what they may take, that wrong ones are left out.

The runtimes' own forms are held against the general ones in `test_forms_of_both_runtimes`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dinoexport
from dinoexport import bundle
from dinoexport.errors import BuildError, InputRefused, UsageError
from dinoexport.models.dinov2 import synthetic
from dinoexport.pipeline import build as pipeline
from dinoexport.runtime import Opened, cpu, sizes
from dinoexport.runtime.sizes import Budget, Specialised
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way
from tests.conftest import DATA

DIMS = tuple(Dim(name=name, min=1, opt=8, max=64) for name in ("batch", "height", "width"))
PIXELS = Tensor(name="pixels", dtype="float32", shape=("batch", 3, "height", "width"), meaning="pixels")
GRAPH = Graph(name="model", inputs=(PIXELS,), outputs=(), dims=DIMS)


class Runtimes:
    """A general form that doubles, and forms of one size that do `as_one`; `held` keeps a compilation waiting."""

    def __init__(self, as_one: float = 2.0) -> None:
        self.as_one, self.answered, self.compiled = as_one, [], []
        self.held = threading.Event()
        self.held.set()

    def _opened(self, name: str, times: float) -> Opened:
        def run(arrays: Any) -> Any:
            self.answered.append(name)
            return {"out": times * arrays["pixels"]}

        return Opened(run=run, arithmetic=lambda _: {})

    def specialise(self, shapes: Mapping[str, tuple[int, ...]]) -> Opened:
        assert self.held.wait(20)
        self.compiled.append(shapes["pixels"])
        return self._opened("one", self.as_one)

    def open(self, spend: Budget, **options: Any) -> Specialised:
        precision = options.pop("precision", Precision.FP32)
        general = self._opened("general", 2.0)
        return Specialised(GRAPH, general, self.specialise, precision=precision, spend=spend, **options)


SPEND = Budget(most=2, memory_bytes=1 << 40, often=3)


def of(*shape: int) -> dict[str, Any]:
    return {"pixels": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def test_a_size_that_is_asked_often_gets_its_form_and_nobody_waits() -> None:
    runtimes = Runtimes()
    runtimes.held.clear()
    run, inputs = runtimes.open(SPEND), of(1, 3, 8, 8)
    for _ in range(6):
        assert np.array_equal(run(inputs)["out"], 2 * inputs["pixels"])
    assert runtimes.answered == ["general"] * 6 and [form.state for form in run.forms] == ["compiling"]
    runtimes.held.set()
    run.settle()
    (form,) = run.forms
    assert (form.state, form.shapes) == ("ready", {"pixels": (1, 3, 8, 8)})
    del runtimes.answered[:]
    assert np.array_equal(run(inputs)["out"], 2 * inputs["pixels"])
    run(of(2, 3, 8, 8))
    assert runtimes.answered == ["one", "general"]
    run.close()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), BuildError("no such form", next_step="None.")])
def test_a_form_that_cannot_be_compiled_costs_no_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a runtime raises: the size stays with the general form, and the next size gets its own."""
    runtimes, inputs = Runtimes(), of(1, 3, 8, 8)
    right = runtimes.specialise

    def specialise(shapes: Mapping[str, tuple[int, ...]]) -> Opened:
        if shapes["pixels"] == (1, 3, 8, 8):
            raise error
        return right(shapes)

    monkeypatch.setattr(runtimes, "specialise", specialise)
    run = runtimes.open(SPEND)
    for asked in (inputs, of(1, 3, 8, 16)):
        for _ in range(4):
            assert np.array_equal(run(asked)["out"], 2 * asked["pixels"])
        run.settle()
    assert [form.state for form in run.forms] == ["refused", "ready"]
    assert str(error).partition(",")[0][:12] in run.forms[0].why


def test_a_client_of_ever_new_sizes_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_COUNTED_MAX", 5)
    run = Runtimes().open(SPEND)
    for width in range(1, 40):
        run(of(1, 3, 8, width))
        assert len(run._asked) <= 5
    assert not run.forms


def test_4096_sizes_are_counted_at_once() -> None:
    """The one that comes after them is counted again from the beginning."""
    run = Runtimes().open(Budget(most=1, memory_bytes=1 << 40, often=2))
    shapes = list(itertools.product(range(1, 17), [3], range(1, 17), range(1, 17)))
    for shape in [*shapes, shapes[0]]:
        run({"pixels": np.broadcast_to(np.float32(0), shape)})
    run.settle()
    assert not run.forms, "the first size was forgotten when the 4097th request came"


def test_what_the_caller_changes_meanwhile_does_not_matter() -> None:
    runtimes = Runtimes()
    runtimes.held.clear()
    run, inputs = runtimes.open(SPEND), of(1, 3, 8, 8)
    for _ in range(3):
        answers = run(inputs)
    inputs["pixels"][:], answers["out"][:] = 0, 7
    runtimes.held.set()
    run.settle()
    assert [form.state for form in run.forms] == ["ready"]


@pytest.mark.parametrize(
    ("as_one", "precision", "state"),
    [
        (2.0, Precision.FP32, "ready"),
        (2.0 * (1 + 5e-6), Precision.FP32, "ready"),
        (2.0 * (1 + 5e-5), Precision.FP32, "differs"),
        (2.01, Precision.BF16, "ready"),
        (2.1, Precision.BF16, "differs"),
        (float("nan"), Precision.FP32, "differs"),
        (float("inf"), Precision.BF16, "differs"),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["named", "asked"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_form_that_answers_otherwise_never_answers(
    as_one: float, precision: Precision, state: str, named: bool
) -> None:
    runtimes, shapes = Runtimes(as_one), {"pixels": (1, 3, 8, 8)}
    run = runtimes.open(SPEND, precision=precision, named=[shapes] if named else [])
    for _ in range(0 if named else 3):
        run(of(1, 3, 8, 8))
    run.settle()
    assert [form.state for form in run.forms] == [state]
    del runtimes.answered[:]
    for _ in range(5):
        run(of(1, 3, 8, 8))
    run.settle()
    assert set(runtimes.answered) == {"one" if state == "ready" else "general"}
    assert len(runtimes.compiled) == 1, "it is not tried again"


def test_a_runtime_that_refuses_one_size_goes_on_with_all() -> None:
    runtimes = Runtimes()

    def refuse(_shapes: Any) -> Opened:
        raise BuildError("no such size", next_step="")

    runtimes.specialise = refuse  # type: ignore[method-assign]
    run = runtimes.open(SPEND, named=[{"pixels": (1, 3, 8, 8)}])
    run.settle()
    assert [(form.state, form.why) for form in run.forms] == [("refused", "no such size")]
    assert "out" in run(of(1, 3, 8, 8))


def test_no_more_forms_than_the_budget_has(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Runtimes().open(SPEND, named=[{"pixels": (1, 3, 8, n)} for n in (8, 9, 10)])
    run.settle()
    assert [form.state for form in run.forms] == ["ready", "ready", "no room"]
    # Measured: a form that makes the process larger than it may be is given back.
    grown = iter(range(0, 10_000, 1000))
    monkeypatch.setattr(sizes, "_resident_bytes", lambda: next(grown))
    run = Runtimes().open(Budget(most=9, memory_bytes=1500), named=[{"pixels": (1, 3, 8, n)} for n in (8, 9)])
    run.settle()
    assert [(form.state, form.memory_bytes) for form in run.forms] == [("ready", 1000), ("no room", 1000)]
    assert run.forms[1].why


def test_closed_while_one_is_compiled() -> None:
    runtimes = Runtimes()
    runtimes.held.clear()
    run = runtimes.open(SPEND, named=[{"pixels": (1, 3, 8, n)} for n in (8, 9)])
    threading.Timer(0.1, runtimes.held.set).start()
    run.close()
    assert len(runtimes.compiled) <= 1 and threading.active_count() < 20
    run(of(1, 3, 8, 8))
    assert runtimes.answered[-1] == "general"


def test_several_threads_ask_at_once() -> None:
    run, inputs = Runtimes().open(SPEND), of(1, 3, 8, 8)
    wrong: list[int] = []

    def ask() -> None:
        wrong.extend(i for i in range(20) if not np.array_equal(run(inputs)["out"], 2 * inputs["pixels"]))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.settle()
    assert not wrong and [form.state for form in run.forms] == ["ready"]


def test_a_size_as_people_write_it() -> None:
    assert sizes.shapes_of("14x28", GRAPH) == {"pixels": (1, 3, 14, 28)}
    assert sizes.shapes_of("2x14X28", GRAPH) == {"pixels": (2, 3, 14, 28)}
    for wrong in ("", "x", "14", "1x2x3x4", "-1x2", "1.5x2", "²x2", "14x", "1e2x3"):
        with pytest.raises(UsageError, match="is not a size of batch, height, width"):
            sizes.shapes_of(wrong, GRAPH)
    with pytest.raises(InputRefused, match="height 65 is outside"):
        sizes.shapes_of("65x8", GRAPH)


def test_a_text_that_is_no_size_is_answered_with_one_in_the_last_two_dimensions() -> None:
    dims = tuple(Dim(name=name, min=1, opt=opt, max=64) for name, opt in (("batch", 2), ("height", 8), ("width", 16)))
    with pytest.raises(UsageError) as caught:
        sizes.dims_of("1000000000x8", Graph(name="model", inputs=(PIXELS,), outputs=(), dims=dims))
    assert caught.value.message == "'1000000000x8' is not a size of batch, height, width."
    assert caught.value.next_step == "Write it as 8x16."
    assert sizes.dims_of("999999999x8", GRAPH) == {"batch": 1, "height": 999_999_999, "width": 8}


def test_a_form_is_made_at_the_request_that_reaches_the_limit_and_none_after_the_end() -> None:
    run, inputs = Runtimes().open(SPEND), of(1, 3, 8, 8)
    run(inputs), run(inputs)
    assert run.forms == ()
    run(inputs)
    assert len(run.forms) == 1
    run.close()
    for _ in range(5):
        run(of(1, 3, 8, 16))
    assert len(run.forms) == 1


def grows(monkeypatch: pytest.MonkeyPatch, *bytes_: int) -> None:
    """The process grows by so much with each form that is compiled."""
    seen = iter([size for number, more in enumerate(bytes_) for size in (number, number + more)])
    monkeypatch.setattr(sizes, "_resident_bytes", lambda: next(seen))


def one_after_the_other(spend: Budget, widths: tuple[int, ...]) -> tuple[list[tuple[str, int, str]], int]:
    """The forms of these widths, each asked for when the one before is ready, and how many were compiled."""
    runtimes = Runtimes()
    run = runtimes.open(spend)
    for width in widths:
        run(of(1, 3, 8, width))
        run.settle()
    return [(form.state, form.memory_bytes, form.why) for form in run.forms], len(runtimes.compiled)


def test_forms_fill_the_budget_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    grows(monkeypatch, 1000, 0, 1000)
    spend = Budget(most=9, memory_bytes=2000, often=1)
    full = ("no room", 0, "other sizes' forms fill the budget")
    assert one_after_the_other(spend, (8, 9, 10, 11)) == (
        [("ready", 1000, ""), ("ready", 0, ""), ("ready", 1000, ""), full],
        3,
    )
    grows(monkeypatch, 2_500_001)
    assert one_after_the_other(Budget(most=9, memory_bytes=2_500_000, often=1), (8,)) == (
        [("no room", 2_500_001, "it takes 3 MB")],
        1,
    )


@pytest.mark.parametrize(("limit", "state"), [(0.5, "ready"), (0.499, "differs")])
def test_the_limit_itself_is_near_enough(limit: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input itself instead of twice: apart by exactly half of what is right, however small that is."""
    monkeypatch.setattr(sizes, "_APART_MAX_NARROW", limit)
    run = Runtimes(as_one=1.0).open(Budget(most=1, memory_bytes=1 << 40, often=1), precision=Precision.BF16)
    run({"pixels": np.ldexp(of(1, 3, 8, 8)["pixels"], -20)})
    run.settle()
    assert [form.state for form in run.forms] == [state]


def test_made_up_inputs_are_the_same_each_time() -> None:
    """The first numbers of NumPy's generator with the seed 0: bytes, or of the normal distribution."""
    inputs = (
        Tensor(name="ids", dtype="int64", shape=("batch", 3), meaning="tokens"),
        Tensor(name="x", dtype="float32", shape=("batch", 2), meaning="values"),
        Tensor(name="scale", dtype="float32", shape=(1,), meaning="has a default", default=1),
    )
    graph = Graph(name="model", inputs=inputs, outputs=(), dims=DIMS[:1])
    found = sizes.sample(graph, {"ids": (2, 3)})
    assert found["ids"].dtype == np.int64 and found["ids"].tolist() == [[172, 47, 117], [192, 67, 251]]
    found = sizes.sample(graph, {"x": (1, 2)})
    assert list(found) == ["x"] and found["x"].dtype == np.float32
    np.testing.assert_allclose(found["x"], [[1.7640524, 0.4001572]])


# The runtimes' own forms


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    request = pipeline.build_request(
        str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out=tmp_path_factory.mktemp("sizes") / "bundle"
    )
    pipeline.export_only(request)
    yield request.out


@pytest.mark.parametrize("runtime", [Runtime.ONNXRUNTIME, Runtime.OPENVINO])
def test_forms_of_both_runtimes(runtime: Runtime, exported: Path) -> None:
    """Three sizes, one of them no multiple of a patch: ready, so as near to the general form as two forms may be."""
    facts = bundle.read_manifest(exported).graphs[0]
    graphs = {exported / facts.file: facts.graph()}
    named = ("98x126", "2x30x69", "518x518")
    way = Way(runtime=runtime, precision=Precision.FP32)
    opened = cpu.open_for_sizes(graphs, way, named=named, spend=Budget(most=3, memory_bytes=1 << 40))["model"]
    assert isinstance(opened, Specialised)
    opened.settle()
    assert [(form.state, form.why) for form in opened.forms] == [("ready", "")] * 3
    general = cpu.open_graphs(graphs, way)["model"]
    for batch, height, width in ((1, 98, 126), (2, 30, 69)):
        pixels = synthetic.pixels(batch, height, width, seed=5)
        for name, expected in general({"pixels": pixels}).items():
            np.testing.assert_allclose(opened({"pixels": pixels})[name], expected, atol=2e-5)
    with pytest.raises(InputRefused):
        opened({"pixels": synthetic.pixels(1, 98, 126, seed=5).astype(np.float64)})
    opened.close()


def test_a_loaded_bundle_has_the_forms_it_was_asked_for(exported: Path) -> None:
    with dinoexport.load(exported, sizes=["98x126"]) as loaded:
        assert loaded.forms == ()
        answers = loaded({"pixels": synthetic.pixels(1, 98, 126, seed=5)})
        (graph,) = loaded._specialised
        graph.settle()
        (form,) = loaded.forms
        assert form.state == "ready" and form.memory_bytes >= 0
        again = loaded({"pixels": synthetic.pixels(1, 98, 126, seed=5)})
    for name in answers:
        np.testing.assert_allclose(again[name], answers[name], atol=2e-5)
    with dinoexport.load(exported, sizes=["98"]) as loaded, pytest.raises(UsageError):
        loaded({"pixels": synthetic.pixels(1, 98, 126, seed=5)})
