"""The models inside Triton's Python backend, with a stand-in of its utilities: what each request gets, and when."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.errors import DinoexportError, UsageError
from dinoexport.runtime import cpu, text_model
from dinoexport.serving.triton import backend, text_backend
from dinoexport.spec import Precision, Runtime, Way
from dinoexport.text.generation import Written
from dinoexport.text.service import QueueFull
from tests.serving.endpoints import SERVED


class Tensor:
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def as_numpy(self) -> Any:
        return self.value


class Metric:
    def __init__(self) -> None:
        self.value, self.increment = 0, self.added

    def added(self, value: float) -> None:
        self.value += value

    def set(self, value: float) -> None:
        self.value = value


class Utilities:
    """triton_python_backend_utils. metrics: (name, kind, labels) -> the metric."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Tensor = Tensor

    def __init__(self) -> None:
        self.logged: list[str] = []
        self.metrics: dict[Any, Metric] = {}
        self.Logger = SimpleNamespace(log_error=self.logged.append)
        codes = {code: code for code in ("INVALID_ARG", "INTERNAL", "UNAVAILABLE")}
        self.TritonError: Any = lambda *said: said
        vars(self.TritonError).update(codes)
        self.MetricFamily: Any = self.family
        self.InferenceResponse: Any = lambda *, output_tensors, error=None: SimpleNamespace(
            error=error, outputs={tensor.name: tensor.value for tensor in output_tensors}
        )

    def family(self, *, name: str, description: str, kind: str) -> Any:
        assert description

        def metric(labels: dict[str, str]) -> Metric:
            made = Metric()
            self.metrics[(name, kind, *labels.values())] = made
            return made

        return SimpleNamespace(Metric=metric)

    @staticmethod
    def get_input_tensor_by_name(request: Any, name: str) -> Any:
        value = request.inputs.get(name)
        return None if value is None else Tensor(name, value)


@pytest.fixture
def utilities(monkeypatch: pytest.MonkeyPatch) -> Utilities:
    made = Utilities()
    for kind in ("COUNTER", "GAUGE"):
        monkeypatch.setattr(Utilities.family, kind, kind, raising=False)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", made)
    return made


def arguments(served: Any = SERVED) -> dict[str, str]:
    config = {"parameters": {"dinoexport": {"string_value": served.model_dump_json()}}}
    return {"model_config": json.dumps(config), "model_repository": "/models/tiny", "model_version": "2"}


def request(*values: float, width: int = 4, wanted: tuple[str, ...] = ("y", "z")) -> Any:
    images = np.stack([np.full((3, width), value, np.float32) for value in values])
    return SimpleNamespace(inputs={"x": images}, requested_output_names=lambda: list(wanted))


@pytest.fixture
def graph(utilities: Utilities, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The graph's model; `model.ran` has the batch of each run, which fails while `model.fails`."""
    opened: list[Any] = []

    def run(arrays: Any) -> Any:
        model.ran.append(len(arrays["x"]))  # type: ignore[attr-defined]
        if model.fails:  # type: ignore[attr-defined]
            raise RuntimeError("out of memory")
        firsts = arrays["x"][:, 0, 0]
        return {"y": np.repeat(firsts[:, None], 4, axis=1), "z": np.repeat(firsts, 6).reshape(len(firsts), 3, 2) + 0.5}

    def open_for_sizes(graphs: Any, way: Any, *, named: Any) -> Any:
        opened.append((list(graphs), way, named))
        return dict.fromkeys(graphs, run)

    monkeypatch.setattr(cpu, "open_for_sizes", open_for_sizes)
    monkeypatch.setattr(cpu, "way_here", lambda way: f"{way.runtime} here")
    way = Way(runtime=Runtime.OPENVINO, precision=Precision.FP32)
    model = backend.GraphModel()
    model.ran, model.fails = [], False  # type: ignore[attr-defined]
    model.initialize(arguments(SERVED.changed(way=way, recipe={"sizes": ["8x8"]})))
    assert opened == [([Path("/models/tiny/2/model.onnx/model.onnx")], "openvino here", ("8x8",))]
    return model


def test_merged_requests_get_their_own_rows(graph: Any) -> None:
    """One run for all that are not refused; each gets the outputs that it asked for."""
    answers = graph.execute([request(1, 2), request(3, wanted=("z",)), request(9, width=9), request(4)])
    assert graph.ran == [4]
    first, second, refused, last = answers
    assert first.outputs["y"].tolist() == [[1] * 4, [2] * 4] and first.outputs["z"].shape == (2, 3, 2)
    assert second.outputs.keys() == {"z"} and second.outputs["z"].tolist() == [[[3.5] * 2] * 3]
    assert last.outputs["y"].tolist() == [[4] * 4] and first.error is None
    assert refused.outputs == {} and refused.error[1] == "INVALID_ARG" and "width" in refused.error[0]
    graph.ran.clear()
    assert [answer.error[1] for answer in graph.execute([request(9, width=9)])] == ["INVALID_ARG"]
    assert graph.ran == []


def test_a_run_that_fails_fails_for_those_that_were_run(graph: Any, utilities: Utilities) -> None:
    """The reason is in the server's log, and a client never sees it."""
    graph.fails = True
    first, refused, last = graph.execute([request(1), request(9, width=9), request(2)])
    broken = ("The model failed on this request; the server's log says why.", "INTERNAL")
    assert first.error == last.error == broken and refused.error[1] == "INVALID_ARG"
    assert len(utilities.logged) == 2 and all("out of memory" in said for said in utilities.logged)
    graph.finalize()


@pytest.mark.parametrize("kind", ["prepare", "finish"])
def test_the_familys_own_code_prepares_and_finishes(
    kind: str, utilities: Utilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Family:
        answer_forms = ("png",)

        def with_answers(self, end: Any, form: str) -> Any: ...

        def prepare(self, name: str, settings: Any, encoded: list[bytes]) -> Any:
            assert (name, settings) == ("images", {"side": 9})
            return self.answered(encoded)

        def finish(self, settings: Any, arrays: Any) -> Any:
            assert settings == {"side": 9} and arrays.keys() == {"x"}
            return self.answered(arrays["x"].reshape(-1).tolist())

        def answered(self, items: list[bytes]) -> Any:
            if items == [b"refused"]:
                raise UsageError("no image", next_step="Send one.")
            if items == [b"broken"]:
                raise RuntimeError("a defect")
            return {"out": np.array([len(items)])}

    monkeypatch.setattr(backend, "parse", lambda _kind, recipe, **_: recipe)
    monkeypatch.setattr(backend.family, "find", lambda _: SimpleNamespace(model=lambda _recipe: Family()))
    given = arguments(SERVED.changed(role=kind, front_end="images", settings={"side": 9}))
    config = json.loads(given["model_config"]) | {"input": [{"name": "x"}]}
    model: Any = backend.PrepareModel() if kind == "prepare" else backend.FinishModel()
    model.initialize(given | {"model_config": json.dumps(config)})
    name = "encoded" if kind == "prepare" else "x"
    asked = [
        SimpleNamespace(inputs={name: np.array(items, object).reshape(-1, 1)})
        for items in ([b"a", b"b"], [b"refused"], [b"broken"])
    ]
    right, refused, broken = model.execute(asked)
    assert right.outputs["out"].tolist() == [2] and right.error is None
    assert refused.error == ("no image Send one.", "INVALID_ARG") and broken.error[1] == "INTERNAL"
    assert len(utilities.logged) == 1 and "a defect" in utilities.logged[0]


class Sender:
    """What a request was sent: (outputs as plain lists or the error, whether it is the last)."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.left = False

    def send(self, response: Any, *, flags: int) -> None:
        if self.left:
            raise RuntimeError("the client has left")
        said = {name: value.tolist() for name, value in response.outputs.items()}
        self.sent.append((response.error or said, flags))

    def is_cancelled(self) -> bool:
        if self.left:
            raise RuntimeError("the answer is closed")
        return False


def text_request(sender: Sender, **values: Any) -> Any:
    return SimpleNamespace(
        inputs={name: np.array(value) for name, value in values.items()}, get_response_sender=lambda: sender
    )


class Service:
    """Accepts tasks; `refuses` is raised in their place."""

    def __init__(self, *given: Any, broken: Any) -> None:
        self.given, self.broken = given, broken
        self.load, self.closed, self.refuses = (3, 7), False, None
        self.tasks: list[Any] = []

    def submit(self, task: Any, reader: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.tasks.append((task, reader))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def text(utilities: Utilities, monkeypatch: pytest.MonkeyPatch) -> Any:
    opened: list[Any] = []

    def open_served(*files: Path, **how: Any) -> Any:
        opened.append((files, how["way"]))
        return SimpleNamespace(tokenizer="tokenizer", decoder="decoder", task=lambda asked: asked)

    monkeypatch.setattr(text_model, "open_served", open_served)
    monkeypatch.setattr(text_backend, "Service", Service)
    model: Any = text_backend.TextModel()
    model.initialize(arguments(SERVED.changed(role="text", tokenizer="t.json")))
    assert opened == [((Path("/models/tiny/2/model.onnx/model.onnx"), Path("/models/tiny/2/t.json")), SERVED.way)]
    assert model._service.given == ("tokenizer", "decoder")
    return model


WRITTEN = Written(text="ab", reason="stop", prompt_tokens=5, ids=(7, 8, 9), first_s=0.5, seconds=1.0)
LAST = {"finish_reason": [b"stop"], "prompt_tokens": [5], "completion_tokens": [3], "token_ids": [7, 8, 9]}


@pytest.mark.parametrize("streams", [None, False, True])
def test_an_answer_is_sent_in_pieces_where_that_is_asked(streams: bool | None, text: Any) -> None:
    """Else all of it is in the last response."""
    sender = Sender()
    asked = {} if streams is None else {"stream": [streams]}
    text.execute([text_request(sender, prompt=[b"caf\xc3\xa9"], max_tokens=[4], stop=[b"x", b"y"], **asked)])
    ((task, reader),) = text._service.tasks
    assert (task.prompt, task.sampling.max_tokens, task.sampling.stop) == ("café", 4, ("x", "y"))
    for piece in ("a", "b"):
        reader.text(piece)
    assert sender.sent == ([({"text": [b"a"]}, 0), ({"text": [b"b"]}, 0)] if streams else [])
    reader.done(WRITTEN)
    assert sender.sent[-1] == ({"text": [b"" if streams else b"ab"]} | LAST, 1)
    assert reader.gone() is False


def test_tokens_and_answers_are_counted(text: Any, utilities: Utilities) -> None:
    text.execute([text_request(Sender(), prompt=[b"a"]), text_request(Sender(), prompt=[b"b"])])
    for _, reader in text._service.tasks:
        reader.done(WRITTEN)
    assert {key: metric.value for key, metric in utilities.metrics.items()} == {
        ("dinoexport_text_tokens_written", "COUNTER", "tiny"): 6,
        ("dinoexport_text_tokens_read", "COUNTER", "tiny"): 10,
        ("dinoexport_text_requests_waiting", "GAUGE", "tiny"): 7,
        ("dinoexport_text_answers", "COUNTER", "tiny", "stop"): 2,
        ("dinoexport_text_answers", "COUNTER", "tiny", "length"): 0,
        ("dinoexport_text_answers", "COUNTER", "tiny", "cancelled"): 0,
    }
    text.finalize()
    assert text._service.closed


@pytest.mark.parametrize(
    ("values", "raised", "told", "code"),
    [
        ({"prompt": [b"a", b"b"]}, None, "prompt has 2 values. Give one.", "INVALID_ARG"),
        ({"prompt": []}, None, "prompt has 0 values. Give one.", "INVALID_ARG"),
        ({"prompt": [b"\xff"]}, None, "prompt is not UTF-8. Encode it as UTF-8.", "INVALID_ARG"),
        ({"prompt": [b"a"]}, QueueFull("It is full.", next_step="Wait."), "It is full. Wait.", "UNAVAILABLE"),
        ({"prompt": [b"a"]}, DinoexportError("A defect."), "A defect.", "INTERNAL"),
        (
            {"prompt": [b"a"]}, RuntimeError("secret"),
            "The model failed on this request; the server's log says why.", "INTERNAL",
        ),
    ],
)  # fmt: skip
def test_a_refusal_is_one_last_response(
    values: dict[str, Any], raised: Any, told: str, code: str, text: Any, utilities: Utilities
) -> None:
    """The requests beside it are taken."""
    sender, text._service.refuses = Sender(), raised
    text.execute([text_request(sender, **values)])
    assert sender.sent == [((told, code), 1)]
    assert ["secret" in said for said in utilities.logged] == ([True] if code == "INTERNAL" and "log" in told else [])
    text._service.refuses = None
    text.execute([text_request(Sender(), prompt=[b"a"])])
    assert len(text._service.tasks) == 1


def test_a_client_that_has_left_is_gone(text: Any, utilities: Utilities) -> None:
    """What Triton's stub raises then is logged; nothing is raised in the thread that writes."""
    sender = Sender()
    text.execute([text_request(sender, prompt=[b"a"])])
    ((_, reader),) = text._service.tasks
    sender.left = True
    assert reader.gone() is True
    reader.done(WRITTEN)
    assert sender.sent == [] and ["RuntimeError" in said for said in utilities.logged] == [True, True]
    try:
        raise RuntimeError("in the model")
    except RuntimeError:
        text._service.broken()
    assert "in the model" in utilities.logged[-1]
