"""A stand-in, not TensorRT: TensorRT-RTX under the name of classic TensorRT 11, for machines that cannot have that.

Its builder takes the same network and configuration, so Polygraphy's classic loader and our worker's classic branch run
for real, timing cache and progress included. What comes out is an RTX engine with a plan's first bytes: no plan. What
only a GPU can say of a plan, once it is opened, is made up here.
"""

from __future__ import annotations

import json
from typing import Any

import tensorrt_rtx
from tensorrt_rtx import *

__version__ = "11.4.0.106"
LAYERS = [
    {"Name": "__myl_MulAdd_myl0_1", "TacticName": "__myl_MulAdd_0x1"},
    {"Name": "_gemm_mha_v2_myl0_7", "TacticName": "_gemm_mha_v2_0xabc"},
    {"Name": "_gemm_mha_v2_myl0_7 [profile 1]", "TacticName": "_gemm_mha_v2_0xabd"},
    {"Name": "_gemm_mha_v2_myl0_9", "TacticName": "_gemm_mha_v2_0xabc"},
    "a layer the inspector gives by name alone",
]


class Builder(tensorrt_rtx.Builder):
    """Makes an RTX engine look like a plan: magic `ftrt`, format 0, version 11.4.0.106."""

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        engine = bytes(super().build_serialized_network(network, config))
        return b"ftrt" + bytes(20) + bytes((11, 4, 0, 106)) + engine[28:]


class Runtime:
    """What a GPU would say."""

    def __init__(self, _logger: Any) -> None:
        self.device_memory_size_v2 = 12345

    def deserialize_cuda_engine(self, engine: bytes) -> Runtime:
        assert engine[:4] == b"ftrt"
        return self

    def create_engine_inspector(self) -> Runtime:
        return self

    def get_engine_information(self, _format: Any) -> str:
        return json.dumps({"Layers": LAYERS, "I/O Tensors": []})
