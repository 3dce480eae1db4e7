"""What a worker opens of a bundle, and what it is proved on before the first image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.embed import opening
from dinoexport.errors import MissingRequirement, ValidationFailed
from dinoexport.spec import Precision, Runtime, Way

FOLDER = Path("bundle")
MANIFEST: Any = SimpleNamespace(
    graphs=(SimpleNamespace(file="model.onnx", graph=lambda: "graph"),), precision=Precision.FP32
)
GRAPHS = {FOLDER / "model.onnx": "graph"}
BUILT = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32, threads=7)
HERE = Way(runtime=Runtime.ONNXRUNTIME, precision=Precision.FP32, threads=2)


@pytest.mark.parametrize(
    ("passed", "not_covered", "refused"),
    [(True, (), False), (False, (), True), (False, ("one",), False), (True, ("one",), False)],
)
def test_a_bundle_is_proved_on_its_smallest_case(
    passed: bool, not_covered: tuple[str, ...], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that does not take that case is not asked for another."""
    cases = tuple(SimpleNamespace(case=SimpleNamespace(name=name)) for name in ("small", "other"))
    smallest = SimpleNamespace(expectations=cases)
    monkeypatch.setattr(opening.reference_file, "read", lambda path: SimpleNamespace(smallest=lambda: smallest))
    report = SimpleNamespace(passed=passed, not_covered=not_covered)
    monkeypatch.setattr(opening.evaluate, "judged", lambda *given: {("it", "its name"): report}[given[0], given[2]])
    candidate: Any = "it"
    if not refused:
        opening.prove(candidate, FOLDER, "its name")
        return
    with pytest.raises(ValidationFailed, match=r"does not give PyTorch's outputs \(case small\)") as caught:
        opening.prove(candidate, FOLDER, "its name")
    assert caught.value.next_step == "dinoexport validate bundle shows by how much."


@pytest.mark.parametrize(
    ("for_gpu", "missing", "on_gpu"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_worker_opens_what_there_is_for_its_gpu(
    for_gpu: bool, missing: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a plan that holds code: nobody checked a signature. On a CPU it takes the threads of its own."""

    def open_on_gpu(*given: Any, trusted: bool) -> Any:
        assert given == ("model", FOLDER, MANIFEST) and not trusted
        if missing:
            raise MissingRequirement("no GPU", next_step="x")
        return SimpleNamespace(candidate="on the GPU", name="its name")

    monkeypatch.setattr(opening.runners, "is_for_gpu", lambda _manifest: for_gpu)
    monkeypatch.setattr(opening.runners, "open_on_gpu", open_on_gpu)
    monkeypatch.setattr(opening.runners, "way_of", lambda _manifest: BUILT)
    monkeypatch.setattr(opening.runners, "driven", lambda model, opened: (model, opened))
    monkeypatch.setattr(
        opening.runners, "candidate_name", lambda precision, way, ran: f"{precision} {way.threads} {ran}"
    )
    monkeypatch.setattr(opening.cpu, "open_graphs", lambda graphs, way: (graphs, way))
    model: Any = "model"
    found = opening.opened(FOLDER, MANIFEST, model, 2, ())
    if on_gpu:
        assert found == ("on the GPU", "its name")
    else:
        assert found == (("model", (GRAPHS, HERE)), "fp32 2 {}")


@dataclass
class Form:
    state: str
    shapes: Any = (("image", (1, 3, 28, 28)),)
    why: str = "no memory"


class Forms:
    """A graph with forms for sizes, which are made in the background until it settles."""

    def __init__(self, *states: str) -> None:
        self.forms: list[Form] = []
        self.states = states

    def settle(self) -> None:
        self.forms = [Form(state) for state in self.states]


def test_forms_for_sizes_are_ready_before_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much memory they take, because they were asked for; a graph whose sizes are fixed needs none."""
    monkeypatch.setattr(opening, "Specialised", Forms)
    monkeypatch.setattr(opening.runners, "is_for_gpu", lambda _manifest: False)
    monkeypatch.setattr(opening.runners, "way_of", lambda _manifest: BUILT)
    monkeypatch.setattr(opening.runners, "driven", lambda _model, opened: opened)
    monkeypatch.setattr(opening.runners, "candidate_name", lambda *_: "name")
    opened: dict[str, Any] = {"one": Forms("ready", "ready"), "two": "fixed"}
    asked: list[Any] = []

    def open_for_sizes(graphs: Any, way: Any, *, named: Any, spend: Any) -> Any:
        asked.append((graphs, way, named, spend.most))
        return opened

    monkeypatch.setattr(opening.cpu, "open_for_sizes", open_for_sizes)
    model: Any = "model"
    sizes = ("28x28", "56x28")
    assert opening.opened(FOLDER, MANIFEST, model, 2, sizes) == (opened, "name")
    assert asked == [(GRAPHS, HERE, sizes, 2)] and len(opened["one"].forms) == 2
    opened["one"] = Forms("ready", "failed")
    with pytest.raises(ValidationFailed) as caught:
        opening.opened(FOLDER, MANIFEST, model, 2, sizes)
    assert caught.value.message == ("The form of the graph for {'image': (1, 3, 28, 28)} cannot be used: no memory.")
