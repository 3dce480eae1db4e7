"""The text model in Triton's Python backend: one thread writes many answers, streamed or whole.

It is decoupled: an answer is several responses, and `execute` returns before the first. Triton's stub sends every
exception as a traceback with this machine's paths, so none leaves this module.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoexport.errors import DinoexportError, UsageError
from dinoexport.serving.triton import text_signature as signature
from dinoexport.serving.triton.backend import served_of
from dinoexport.text import requests as text_requests
from dinoexport.text.generation import Written
from dinoexport.text.service import QueueFull, Service


class TextModel:
    """The model of one version's folder; see `text_signature` for what it takes and gives."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens graph and tokenizer, and starts the thread that writes."""
        import triton_python_backend_utils as backend

        from dinoexport.runtime import text_model

        served = served_of(args)
        folder = Path(args["model_repository"]) / args["model_version"]
        file = served.graph.file
        self._model = text_model.open_served(
            # Triton's layout for external data: a folder of the graph's name.
            folder / file / file,
            folder / served.tokenizer,
            graph=served.graph.graph(),
            family_name=served.family,
            recipe=served.recipe,
            way=served.way,
        )
        self._metrics = _Metrics(served.name)
        self._service = Service(
            self._model.tokenizer,
            self._model.decoder,
            broken=lambda: backend.Logger.log_error(traceback.format_exc()),
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Queues each request or refuses it; answers are sent by the thread."""
        for request in requests:
            sender = request.get_response_sender()
            reader = _Sender(sender, self._count)
            try:
                values = _values(request)
                reader.streams = bool(values.pop(signature.STREAM, False))
                self._service.submit(self._model.task(text_requests.parse(values)), reader)
            except DinoexportError as error:
                reader.failed(error)
            except Exception:
                _log_broken()
                reader.failed(DinoexportError("The model failed on this request; the server's log says why."))

    def _count(self, written: Written) -> None:
        self._metrics.count(written, waiting=self._service.load[1])

    def finalize(self) -> None:
        """Triton unloads the model."""
        self._service.close()


class _Sender:
    """A `service.Reader` that sends Triton's responses."""

    def __init__(self, sender: Any, count: Callable[[Written], None]) -> None:
        self._sender, self._count = sender, count
        self.streams = False

    def text(self, text: str) -> None:
        if self.streams:
            self._send({signature.TEXT: [text.encode()]})

    def done(self, written: Written) -> None:
        import numpy as np

        self._count(written)
        whole = "" if self.streams else written.text
        self._send(
            {
                signature.TEXT: [whole.encode()],
                signature.REASON: [written.reason.encode()],
                signature.PROMPT_TOKENS: np.array([written.prompt_tokens], np.int32),
                signature.TOKENS: np.array([len(written.ids)], np.int32),
                signature.TOKEN_IDS: np.array(written.ids, np.int64),
            },
            last=True,
        )

    def failed(self, error: DinoexportError) -> None:
        import triton_python_backend_utils as backend

        code = backend.TritonError.INTERNAL
        if isinstance(error, UsageError):
            code = backend.TritonError.INVALID_ARG
        elif isinstance(error, QueueFull):
            code = backend.TritonError.UNAVAILABLE
        told = backend.TritonError(f"{error.message} {error.next_step}".strip(), code)
        self._respond(backend.InferenceResponse(output_tensors=[], error=told), last=True)

    def gone(self) -> bool:
        try:
            return bool(self._sender.is_cancelled())
        except Exception:
            _log_broken()
            return True

    def _send(self, outputs: Mapping[str, Any], *, last: bool = False) -> None:
        import numpy as np
        import triton_python_backend_utils as backend

        tensors = [
            backend.Tensor(name, value if isinstance(value, np.ndarray) else np.array(value, dtype=object))
            for name, value in outputs.items()
        ]
        self._respond(backend.InferenceResponse(output_tensors=tensors), last=last)

    def _respond(self, response: Any, *, last: bool) -> None:
        import triton_python_backend_utils as backend

        try:
            self._sender.send(response, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)
        except Exception:  # the client has left, and the server has closed the answer
            _log_broken()


class _Metrics:
    """Counters of the server's own metrics endpoint; Triton counts requests, not tokens."""

    def __init__(self, model: str) -> None:
        import triton_python_backend_utils as backend

        def family(name: str, kind: str, description: str) -> Any:
            kinds = {"counter": backend.MetricFamily.COUNTER, "gauge": backend.MetricFamily.GAUGE}
            return backend.MetricFamily(name=name, description=description, kind=kinds[kind])

        self._families = [
            family(signature.METRIC_TOKENS, "counter", "Tokens written"),
            family(signature.METRIC_PROMPT_TOKENS, "counter", "Tokens read"),
            family(signature.METRIC_ANSWERS, "counter", "Answers by how they ended"),
            family(signature.METRIC_WAITING, "gauge", "Requests that wait for their turn"),
        ]
        tokens, prompt_tokens, answers, waiting = self._families
        self._tokens = tokens.Metric(labels={"model": model})
        self._prompt_tokens = prompt_tokens.Metric(labels={"model": model})
        self._waiting = waiting.Metric(labels={"model": model})
        self._answers = {
            reason: answers.Metric(labels={"model": model, "reason": reason})
            for reason in ("stop", "length", "cancelled")
        }

    def count(self, written: Written, *, waiting: int) -> None:
        self._tokens.increment(len(written.ids))
        self._prompt_tokens.increment(written.prompt_tokens)
        self._answers[written.reason].increment(1)
        self._waiting.set(waiting)


def _values(request: Any) -> dict[str, Any]:
    """The client's inputs as plain values, as in JSON."""
    import triton_python_backend_utils as backend

    found: dict[str, Any] = {}
    for name, listed in signature.INPUTS.items():
        tensor = backend.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        values = [_plain(value, name) for value in tensor.as_numpy().reshape(-1).tolist()]
        if listed.many:
            found[name] = values
        elif len(values) == 1:
            found[name] = values[0]
        else:
            raise UsageError(f"{name} has {len(values)} values.", next_step="Give one.")
    return found


def _plain(value: Any, name: str) -> Any:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8.", next_step="Encode it as UTF-8.") from None


def _log_broken() -> None:
    import triton_python_backend_utils as backend

    backend.Logger.log_error(traceback.format_exc())
