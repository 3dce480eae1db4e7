"""The client against a server that is faked in memory: which model is asked, with what, how often, and what is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from dinoexport.bundle import GraphFacts
from dinoexport.errors import DinoexportError, InputRefused, UsageError
from dinoexport.serving import client
from dinoexport.serving.client import DinoClient
from dinoexport.serving.transport import ServerBusy, ServerError
from dinoexport.serving.triton.signature import PARAMETER, Served
from dinoexport.spec import Arrays, Dim, Graph, Precision, Tensor


def graph(name: str = "model", **outputs: tuple[int | str, ...]) -> Graph:
    return Graph(
        name=name,
        inputs=(Tensor(name="x", dtype="float32", shape=("batch", 4), meaning=""),),
        outputs=tuple(
            Tensor(name=output, dtype="float32", shape=shape, meaning="")
            for output, shape in (outputs or {"y": ("batch",), "z": ("batch", 2)}).items()
        ),
        dims=(Dim(name="batch", min=1, opt=1, max=3),),
    )


def served(name: str = "tiny", of: Graph | None = None, *, answers: Graph | None = None, **facts: Any) -> Served:
    return Served(
        name=name, version=1, variant="tiny", family="dinov2", precision=Precision.FP32, recipe={},
        graph=GraphFacts.of(of or graph(), "model.onnx"),
        answers=None if answers is None else GraphFacts.of(answers, "model.onnx"), **{"role": "graph"} | facts,
    )  # fmt: skip


class Server:
    """Triton models by their names; `refusals` are raised one after the other before anything is answered."""

    def __init__(self, **models: Served | None) -> None:
        self.served = models
        self.refusals: list[DinoexportError] = []
        self.asked: list[tuple[str, Any, tuple[str, ...], Any]] = []
        self.limits: list[int] = []
        self.regions: list[tuple[str, int]] = []
        self.maps = True
        self.form: Callable[[Array], Any] = lambda array: array

    def limit(self, max_bytes: int) -> None:
        self.limits.append(max_bytes)

    def models(self) -> tuple[str, ...]:
        if self.refusals:
            raise self.refusals.pop(0)
        return tuple(self.served)

    def config(self, model: str) -> dict[str, Any]:
        facts = self.served[model]
        return {} if facts is None else {"parameters": {PARAMETER: {"string_value": facts.model_dump_json()}}}

    def infer(self, model: str, arrays: Arrays, outputs: Sequence[str], *, shared: Mapping[str, Any]) -> dict[str, Any]:
        if self.refusals:
            raise self.refusals.pop(0)
        self.asked.append((model, {n: a.tolist() for n, a in arrays.items()}, tuple(outputs), dict(shared)))
        rows = len(next(iter(arrays.values())))
        shapes = {"y": (rows, 1), "z": (rows, 2), "labels": (rows, 5)}
        return {name: np.ones(shapes[name], np.float32) for name in outputs}

    def register(self, region: str, key: str, size_bytes: int) -> None:
        assert key == f"/{region}"
        if not self.maps:
            raise UsageError("not allowed")
        self.regions.append((region, size_bytes))

    def unregister(self, region: str) -> None:
        self.regions.append((region, 0))


Array = np.ndarray[Any, Any]
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Server]:
    def to(**models: Served | None) -> Server:
        server = Server(**models)
        monkeypatch.setattr(client.connection, "connect", lambda *_, **__: server)
        return server

    return to


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were slept; time stands still between them."""
    slept: list[float] = []
    monkeypatch.setattr(client.time, "monotonic", lambda: 100 + sum(slept))
    monkeypatch.setattr(client.time, "sleep", slept.append)

    def longest(low: float, high: float) -> float:
        assert (low, high) == (0.5, 1.5)
        return high

    monkeypatch.setattr(client.random, "uniform", longest)
    return slept


def test_a_graph_is_asked_for_its_outputs(connected: Callable[..., Server]) -> None:
    """A number for each item comes as (B, 1) from Triton, and as (B,) to the caller."""
    server = connected(tiny=served(), other=None)
    with DinoClient("http://h:8000") as ours:
        found = ours(X)
        assert found["y"].shape == (2,) and found["z"].shape == (2, 2)
        assert asyncio.run(ours.call_async(X))["y"].shape == (2,)
        with pytest.raises(InputRefused):
            ours({"x": np.zeros((4, 4), np.float32)})
    assert server.asked == [("tiny", {"x": X["x"].tolist()}, ("y", "z"), {})] * 2
    assert not ours.shares_memory and server.regions == []


ENDS = {
    "a_front": served(role="front_end", front_end="a"),
    "b_front": served(role="front_end", front_end="b", answers=graph(labels=("batch", 5))),
    "a_prepare": served(role="prepare", front_end="a"),
    "others_front": served("others", role="front_end", front_end="c"),
}


@pytest.mark.parametrize(("end", "model", "outputs"), [(None, "a_front", ("y", "z")), ("b", "b_front", ("labels",))])
def test_encoded_files_go_to_a_front_end(
    end: str | None, model: str, outputs: tuple[str, ...], connected: Callable[..., Server]
) -> None:
    server = connected(tiny=served(), **ENDS)
    ours = DinoClient("http://h:8000")
    found = ours.encoded([b"one", b"two"], front_end=end)
    assert server.asked == [(model, {"encoded": [[b"one"], [b"two"]]}, outputs, {})] and tuple(found) == outputs
    assert tuple(asyncio.run(ours.encoded_async([b"one"], front_end=end))) == outputs
    assert server.limits == [max(map(client.answers.signature, (graph(), graph(labels=("batch", 5)))))]


def test_front_ends_that_are_not_there(connected: Callable[..., Server]) -> None:
    connected(tiny=served(), **ENDS)
    with pytest.raises(UsageError, match="no front end 'c'") as refused:
        DinoClient("http://h:8000").encoded([b"x"], front_end="c")
    assert refused.value.next_step == "It has: a, b."
    connected(tiny=served())
    with pytest.raises(UsageError) as refused:
        DinoClient("http://h:8000").encoded([b"x"])
    assert refused.value.next_step == "It has: none; send arrays."


@pytest.mark.parametrize(("count", "taken"), [(0, False), (1, True), (3, True), (4, False)])
def test_files_are_a_batch(count: int, taken: bool, connected: Callable[..., Server]) -> None:
    connected(tiny=served(), **ENDS)
    ours = DinoClient("http://h:8000")
    if taken:
        assert len(ours.encoded([b"x"] * count)["y"]) == count
    else:
        with pytest.raises(InputRefused, match=f"{count} items are not a batch of 1 to 3"):
            ours.encoded([b"x"] * count)


def test_a_busy_server_is_asked_again_after_longer_pauses(connected: Callable[..., Server], clock: list[float]) -> None:
    server = connected(tiny=served())
    ours = DinoClient("http://h:8000", timeout_s=60.0)
    server.refusals = [ServerBusy("busy")] * 12
    ours(X)
    assert clock == pytest.approx([0.075, 0.15, 0.3, 0.6, 1.2] + [1.5] * 7)


def test_a_server_that_stays_busy_is_given_up_in_time(connected: Callable[..., Server], clock: list[float]) -> None:
    server = connected(tiny=served())
    server.refusals = [ServerBusy("busy")] * 1000
    with pytest.raises(ServerBusy):
        DinoClient("http://h:8000", timeout_s=3.0)
    assert sum(clock) == pytest.approx(3.0)


def test_another_error_is_not_waited_for(connected: Callable[..., Server], clock: list[float]) -> None:
    connected(tiny=served()).refusals = [ServerError("broken")]
    with pytest.raises(ServerError, match="broken"):
        DinoClient("http://h:8000")
    assert clock == []


def test_answers_are_held_to_the_signature(connected: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = connected(tiny=served())
    ours = DinoClient("http://h:8000")
    monkeypatch.setattr(server, "infer", lambda *_, **__: {"y": np.ones((2, 1), np.float32)})
    with pytest.raises(client.answers.Malformed, match="lacks z"):
        ours(X)
    two = {"y": np.ones((2, 2), np.float32), "z": np.ones((2, 2), np.float32)}
    monkeypatch.setattr(server, "infer", lambda *_, **__: dict(two))
    with pytest.raises(client.answers.Malformed, match="y is float32 of rank 2"):
        ours(X)


TWO = {
    "tiny_a": served(of=graph("a")), "tiny_b": served(of=graph("b")),
    "tiny_a_front": served(of=graph("a"), role="front_end"),
    "large": served("large"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "graph_name"), [("tiny/a", "a"), ("tiny/b", "b"), ("large", "model")])
def test_one_graph_by_its_name(model: str, graph_name: str, connected: Callable[..., Server]) -> None:
    connected(**TWO)
    assert DinoClient("http://h:8000", model=model).graph.name == graph_name


@pytest.mark.parametrize(
    ("models", "asked", "message"),
    [
        (TWO, None, "http://h:8000 serves 3 graphs."),
        (TWO, "tiny", "http://h:8000 serves 2 graphs called tiny."),
        (TWO, "larg", "http://h:8000 serves no 'larg'. Did you mean 'large'?"),
        ({"other": None}, None, "http://h:8000 serves no model of dinoexport's."),
        ({"a_front": ENDS["a_front"]}, "tiny", "http://h:8000 serves no model of dinoexport's."),
    ],
)
def test_no_one_graph(
    models: dict[str, Any], asked: str | None, message: str, connected: Callable[..., Server]
) -> None:
    connected(**models)
    for opened in (DinoClient, client.open_graphs) if asked != "tiny" or len(models) < 2 else (DinoClient,):
        with pytest.raises(UsageError) as refused:
            opened("http://h:8000", model=asked)
        assert refused.value.message == message
    if len(models) > 2:
        assert refused.value.next_step == "Name one as the model: large/model, tiny/a, tiny/b."


def test_all_graphs_of_one_model(connected: Callable[..., Server]) -> None:
    connected(**TWO)
    found = client.open_graphs("http://h:8000", model="tiny")
    assert {name: ours.served.graph.name for name, ours in found.items()} == {"a": "a", "b": "b"}
    connected(large=served("large"), large_front=served("large", role="front_end", front_end="a"))
    assert list(client.open_graphs("http://h:8000")) == ["model"]


@pytest.mark.parametrize(
    ("models", "asked", "writes"),
    [
        ({"t": served("t", role="text")}, None, True),
        ({"t": served("t", role="text"), "tiny": served()}, None, False),
        ({"t": served("t", role="text"), "tiny": served()}, "t", True),
        ({"t": served("t", role="text"), "tiny": served()}, "tiny", False),
        ({"t": served("t", role="text")}, "u", False),
        ({"other": None}, None, False),
    ],
)
def test_whether_text_is_served(
    models: dict[str, Any], asked: str | None, writes: bool, connected: Callable[..., Server]
) -> None:
    connected(**models)
    assert client.text_served("http://h:8000", model=asked) is writes


def test_shared_memory_holds_what_a_request_needs(connected: Callable[..., Server]) -> None:
    """One region, made anew only to grow; inputs lie behind each other."""
    pytest.importorskip("tritonclient.utils.shared_memory")
    wide = Graph(
        name="model",
        inputs=tuple(Tensor(name=name, dtype="float32", shape=("batch", 4), meaning="") for name in ("x", "w")),
        outputs=graph().outputs,
        dims=graph().dims,
    )
    server = connected(tiny=served(of=wide))
    with DinoClient("http://h:8000", shared_memory=True) as ours:
        assert ours.shares_memory
        for rows in (2, 1, 2, 3):
            ours({name: np.ones((rows, 4), np.float32) for name in ("x", "w")})
    (first, one), (gone, _), (second, two), *rest = server.regions
    assert (one, gone, two) == (1, first, 2 * 2 * 16) and second != first
    (again, _), (third, three), (last, none) = rest
    assert (again, three, last, none) == (second, 2 * 3 * 16, third, 0)
    places = [shared for *_, shared in server.asked]
    assert places[0] == {"x": (second, 32, 0), "w": (second, 32, 32)}
    assert places[1] == {"x": (second, 16, 0), "w": (second, 16, 16)} and places[3]["w"] == (third, 48, 48)
    assert not ours.shares_memory


def test_a_server_that_maps_no_memory_gets_arrays(connected: Callable[..., Server]) -> None:
    pytest.importorskip("tritonclient.utils.shared_memory")
    server = connected(tiny=served())
    server.maps = False
    ours = DinoClient("http://h:8000", shared_memory=True)
    ours(X)
    assert not ours.shares_memory and server.asked[0][3] == {} and all(not size for _, size in server.regions)
