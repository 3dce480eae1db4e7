"""A stand-in, not TensorRT: TensorRT-RTX under the name of classic TensorRT, for machines that cannot have that.

Its builder takes the same network and configuration, so Polygraphy's classic loader and our worker's classic branch run
for real, timing cache and progress included. What comes out is an RTX engine with a plan's first bytes: no plan. What
only a GPU can say of a plan, once it is opened, is made up here.

STANDIN_TENSORRT is the version whose face it shows, by the table of facts: members that version lacks are taken away,
and network flags have its values.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as _flavour
from tensorrt_rtx import *

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.standin import facts
from tests.standin.gpu import LAYERS

_TABLE = json.loads((Path(__file__).parents[2] / "data" / "tensorrt_facts.json").read_text())
_FULL = os.environ.get("STANDIN_TENSORRT", "11.4.0.106")
_FACTS = facts.at(_TABLE, _FULL)
_RTX = facts.at(_TABLE, next(version for version in _TABLE["versions"] if version.startswith("rtx-")))
__version__ = _FULL.partition(".post")[0]
_NUMBERS = tuple(int(part) for part in __version__.split("."))


def _take_away() -> None:
    """What TensorRT-RTX has and this version has not."""
    for name, members in _RTX.items():
        kind = globals().get(name)
        if kind is None or name.startswith("_"):
            continue
        if name not in _FACTS:
            del globals()[name]
            continue
        for member in members.keys() - _FACTS[name].keys():
            delattr(kind, member)


_take_away()
_Flags = enum.IntEnum(  # type: ignore[misc]
    "_Flags", {name: int(value) for name, value in _FACTS["NetworkDefinitionCreationFlag"].items()}
)
_OWN_FLAGS = _flavour.NetworkDefinitionCreationFlag
NetworkDefinitionCreationFlag = _Flags
_get_flag = _flavour.INetworkDefinition.get_flag


def _get_own_flag(network: Any, flag: Any) -> bool:
    own = getattr(_OWN_FLAGS, flag.name, None)  # TensorRT-RTX has not all of them
    return flag.name == "EXPLICIT_BATCH" or (own is not None and _get_flag(network, own))


_flavour.INetworkDefinition.get_flag = _get_own_flag


class Builder(_flavour.Builder):
    """Makes an RTX engine look like a plan: magic `ftrt`, format 0, this version."""

    def create_network(self, flags: int = 0) -> Any:
        known = [flag for flag in _Flags if flags & (1 << flag)]
        assert flags == sum(1 << flag for flag in known), "a flag this version has not"
        kept = [flag for flag in known if flag.name != "EXPLICIT_BATCH"]  # in TensorRT-RTX there is no other
        return super().create_network(sum(1 << int(getattr(_OWN_FLAGS, flag.name)) for flag in kept))

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        engine = bytes(super().build_serialized_network(network, config))
        return memoryview(b"ftrt" + bytes(20) + bytes(_NUMBERS) + engine[28:])


class Runtime:
    """What a GPU would say."""

    def __init__(self, logger: Any) -> None:
        if not isinstance(logger, _flavour.ILogger):
            raise TypeError("incompatible constructor arguments")
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine:
        assert bytes(memoryview(serialized_engine)[:4]) == b"ftrt"
        return ICudaEngine()


class ICudaEngine:
    """An opened plan."""

    device_memory_size_v2 = 12345

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class EngineInspector:
    """Its layers."""

    def get_engine_information(self, format: Any) -> str:  # noqa: A002 (TensorRT's name for it)
        return json.dumps({"Layers": LAYERS, "I/O Tensors": []})
