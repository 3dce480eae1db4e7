"""`[graph] interface = "transformers"`: the graph with the names of Hugging Face's tools, and the files they read.

Names and order are those of transformers' Dinov2Model and Dinov2WithRegistersModel (modeling_dinov2.py): input
`pixel_values`; outputs `last_hidden_state` (class, register and patch tokens in one) and `pooler_output` (class token).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dinoexport.family import Call, Piece, Read
from dinoexport.images import Preprocessing
from dinoexport.models.dinov2.model import Dinov2Model
from dinoexport.models.dinov2.uses import ImageUses
from dinoexport.spec import Array, Arrays, Case, Graph, Picture, Progress, Tensor, Workload

_OURS, _THEIRS = "pixels", "pixel_values"
_TOKENS, _POOLED = "last_hidden_state", "pooler_output"


@dataclass(frozen=True, kw_only=True)
class TransformersModel(Dinov2Model):
    """A variant whose graph has transformers' names. Everything else is the family's own."""

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        """One graph, `model`: the other form's with its input renamed and its outputs joined."""
        (graph,) = super().graphs
        dim = self.arch.embed_dim
        registers = f", {self.arch.register_count} register tokens" if self.arch.register_count else ""
        outputs = (
            Tensor(
                name=_TOKENS,
                dtype="float32",
                shape=("batch", "tokens", dim),
                meaning=f"class token{registers} and patch tokens, row by row, of the last block, after the final norm",
            ),
            Tensor(name=_POOLED, dtype="float32", shape=("batch", dim), meaning="class token, after the final norm"),
        )
        return (replace(graph, inputs=(replace(graph.inputs[0], name=_THEIRS),), outputs=outputs),)

    @property
    def companion_files(self) -> Mapping[str, bytes]:
        """`config.json` and `preprocessor_config.json`, as in the published models."""
        return {
            "config.json": _json(self._config),
            "preprocessor_config.json": _json(_preparation(self.preprocessing)),
        }

    @property
    def _config(self) -> dict[str, Any]:
        arch = self.arch
        with_registers = arch.register_count > 0
        return {
            "architectures": ["Dinov2WithRegistersModel" if with_registers else "Dinov2Model"],
            "model_type": "dinov2_with_registers" if with_registers else "dinov2",
            **({"num_register_tokens": arch.register_count} if with_registers else {}),
            "hidden_size": arch.embed_dim,
            "num_hidden_layers": arch.depth,
            "num_attention_heads": arch.num_heads,
            "mlp_ratio": 4,
            "use_swiglu_ffn": arch.feed_forward == "swiglu",
            "hidden_act": _ACTIVATIONS[arch.activation],
            "qkv_bias": arch.qkv_bias,
            "layer_norm_eps": arch.layer_norm_eps,
            "image_size": arch.native_size,
            "patch_size": arch.patch_size,
            "num_channels": arch.in_chans,
            "torch_dtype": "float32",
        }

    def calls(self, graph: Graph, read: Read) -> tuple[Call, ...]:
        """The family's own pieces, with a head that keeps the tokens in one tensor."""
        *body, head = super().calls(graph, read)
        piece = Piece(
            name=f"whole {head.piece.name}",
            code="dinoexport.models.dinov2.graph:WholeHead",
            arguments={"dim": self.arch.embed_dim, "epsilon": self.arch.layer_norm_eps},
            example_inputs=head.piece.example_inputs,
            dynamic=head.piece.dynamic,
            least_sizes=head.piece.least_sizes,
        )
        return (*body, replace(head, piece=piece, outputs=(_TOKENS, _POOLED)))

    def normalised(self, arrays: Arrays) -> Array:
        """As in the other form; the input is already normalised."""
        return arrays[_THEIRS]

    def named(self, tokens_BND: Mapping[int, Array]) -> dict[str, Array]:
        """The last block's tokens together, and its class token."""
        import numpy as np

        tokens = tokens_BND[self.arch.depth - 1]
        return {_TOKENS: np.ascontiguousarray(tokens), _POOLED: np.ascontiguousarray(tokens[:, 0])}

    def case(self, table: Mapping[str, Any], folder: Path) -> Case:
        """As the other form's, under the other name."""
        return _renamed(super().case(table, folder))

    def cases_from(
        self, folder: Path, *, progress: Progress, only: Collection[str] | None = None
    ) -> Iterator[Case | str]:
        """As the other form's, under the other name."""
        for found in super().cases_from(folder, progress=progress, only=only):
            yield found if isinstance(found, str) else _renamed(found)

    def prepare(self, front_end: str, settings: Mapping[str, Any], encoded: Sequence[bytes]) -> dict[str, Array]:
        """As the other form's, under the other name."""
        return {_THEIRS: super().prepare(front_end, settings, encoded)[_OURS]}

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """As the other form's, under the other name."""
        return tuple(replace(load, inputs={_THEIRS: load.inputs[_OURS]}) for load in super().workloads)

    @property
    def uses(self) -> ImageUses:
        """As the other form's, of the tokens taken apart."""
        return _Uses(preprocessing=self.preprocessing, register_count=self.arch.register_count)

    def pictures(
        self, case: Case, reference: Arrays, candidates: Mapping[str, Arrays]
    ) -> tuple[tuple[Picture, ...], ...]:
        """As the other form's, of the tokens taken apart."""
        apart = {
            name: _apart(found, self.arch.register_count) for name, found in candidates.items() if _TOKENS in found
        }
        return super().pictures(case, _apart(reference, self.arch.register_count), apart)


@dataclass(frozen=True, kw_only=True)
class _Uses(ImageUses):
    register_count: int

    def features(self, outputs: Arrays) -> dict[str, Array]:
        return super().features(_apart(outputs, self.register_count))

    def second_view(self, inputs: Arrays) -> dict[str, Array]:
        return {_THEIRS: super().second_view({_OURS: inputs[_THEIRS]})[_OURS]}

    def matches(self, outputs: Arrays, of_view: Arrays) -> Array:
        return super().matches(*(_apart(arrays, self.register_count) for arrays in (outputs, of_view)))


def _apart(outputs: Arrays, register_count: int) -> dict[str, Array]:
    """The tokens under the names of the family's own graph."""
    tokens_BND = outputs[_TOKENS]
    return {"class_token": tokens_BND[:, 0], "patch_tokens": tokens_BND[:, 1 + register_count :]}


def _renamed(case: Case) -> Case:
    return replace(case, inputs={_THEIRS: case.inputs[_OURS]})


_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
# Pillow's numbers, which Hugging Face stores.
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def _preparation(preprocessing: Preprocessing) -> dict[str, Any]:
    """The recipe's `[preprocess]` as settings of transformers' BitImageProcessor."""
    height, width = preprocessing.crop_size
    resize = preprocessing.resize
    size = {"shortest_edge": resize} if isinstance(resize, int) else dict(zip(("height", "width"), resize, strict=True))
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": _RESAMPLING[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
