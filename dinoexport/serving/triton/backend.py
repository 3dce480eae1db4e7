"""The models that run in Triton's Python backend: a graph on the CPU, decoding and finishing of a front end.

This module runs inside the server's own interpreter; each deployed `model.py` names one of these classes. Inputs
outside the graph's signature are refused with INVALID_ARG and the message of all runtimes, because the dims of a
configuration limit no size. An exception would reach the client as a 500 with a traceback, so none leaves `execute`.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoexport import family
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import InputRefused, UsageError
from dinoexport.runtime import check_inputs, cpu
from dinoexport.runtime.sizes import Specialised
from dinoexport.serving.triton.signature import ENCODED, Served
from dinoexport.spec import Array, Arrays, Runner

_BROKEN = "The model failed on this request; the server's log says why."


class GraphModel:
    """An ONNX graph, run as in its bundle. Requests that Triton merged are answered by one run."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the graph in this version's folder."""
        served = served_of(args)
        self._graph, file = served.graph.graph(), served.graph.file
        folder = Path(args["model_repository"]) / args["model_version"]
        # Triton's layout for external data: a folder of the graph's name.
        sizes = tuple(served.recipe.get("sizes", ()))
        graphs = {folder / file / file: self._graph}
        (opened,) = cpu.open_for_sizes(graphs, cpu.way_here(served.way), named=sizes).values()
        self._run: Runner = opened
        self._opened = opened

    def finalize(self) -> None:
        """Stops compiling forms for sizes that are often asked."""
        if isinstance(self._opened, Specialised):
            self._opened.close()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order; each request is refused or answered separately."""
        import numpy as np
        import triton_python_backend_utils as backend

        responses: dict[int, Any] = {}
        asked: dict[int, Arrays] = {}
        for i, request in enumerate(requests):
            arrays = {
                tensor.name: backend.get_input_tensor_by_name(request, tensor.name).as_numpy()
                for tensor in self._graph.inputs
            }
            try:
                check_inputs(self._graph, arrays)
                asked[i] = arrays
            except InputRefused as refused:
                responses[i] = _refusal(refused)
        if asked:
            merged = {t.name: np.concatenate([arrays[t.name] for arrays in asked.values()]) for t in self._graph.inputs}
            ends = np.cumsum([next(iter(arrays.values())).shape[0] for arrays in asked.values()])[:-1]
            try:
                answers = {name: np.split(array, ends) for name, array in self._run(merged).items()}
            except Exception:
                return [responses.get(i) or _broken() for i in range(len(requests))]
            for place, i in enumerate(asked):
                wanted = requests[i].requested_output_names()
                responses[i] = _response({name: answers[name][place] for name in wanted})
        return [responses[i] for i in range(len(requests))]


class PrepareModel:
    """A front end's first half: encoded files in, the graph's inputs out, by the family's own code."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Finds the family of the model."""
        self._served = served_of(args)
        recipe = parse(Recipe, self._served.recipe, where="the deployed recipe")
        self._model = family.find(self._served.family).model(recipe)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        import triton_python_backend_utils as backend

        responses = []
        for request in requests:
            encoded = backend.get_input_tensor_by_name(request, ENCODED).as_numpy()
            try:
                arrays = self._model.prepare(self._served.front_end, self._served.settings, list(encoded.reshape(-1)))
                responses.append(_response(arrays))
            except UsageError as refused:
                responses.append(_refusal(refused))
            except Exception:
                responses.append(_broken())
        return responses


class FinishModel:
    """A front end's last part: the graph's outputs in, another form of them out, by the family's own code."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Finds the family, and what its last part takes."""
        self._served = served_of(args)
        recipe = parse(Recipe, self._served.recipe, where="the deployed recipe")
        model = family.find(self._served.family).model(recipe)
        assert isinstance(model, family.FinishesAnswers), "only such a model's answers are finished"
        self._model = model
        self._inputs = [entry["name"] for entry in json.loads(args["model_config"])["input"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        import triton_python_backend_utils as backend

        responses = []
        for request in requests:
            arrays = {name: backend.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            try:
                responses.append(_response(self._model.finish(self._served.settings, arrays)))
            except UsageError as refused:
                responses.append(_refusal(refused))
            except Exception:
                responses.append(_broken())
        return responses


def served_of(args: Mapping[str, str]) -> Served:
    """The facts in the model's configuration."""
    served = Served.of_config(json.loads(args["model_config"]))
    assert served is not None, "the model was configured by dinoexport deploy"
    return served


def _response(arrays: Mapping[str, Array]) -> Any:
    import numpy as np
    import triton_python_backend_utils as backend

    tensors = [backend.Tensor(name, np.ascontiguousarray(array)) for name, array in arrays.items()]
    return backend.InferenceResponse(output_tensors=tensors)


def _refusal(refused: UsageError) -> Any:
    import triton_python_backend_utils as backend

    error = backend.TritonError(f"{refused.message} {refused.next_step}", backend.TritonError.INVALID_ARG)
    return backend.InferenceResponse(output_tensors=[], error=error)


def _broken() -> Any:
    """Logs the traceback of the handled exception on the server; a client never sees it."""
    import triton_python_backend_utils as backend

    backend.Logger.log_error(traceback.format_exc())
    error = backend.TritonError(_BROKEN, backend.TritonError.INTERNAL)
    return backend.InferenceResponse(output_tensors=[], error=error)
