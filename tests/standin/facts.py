"""What each version of TensorRT's Python bindings offers: names, arguments and values, read off the real modules.

`python facts.py MODULE` prints one module's facts as JSON. `tests/data/tensorrt_facts.json` has those of every version,
each member once with the versions it is so in. A member is written as its overloads (`name: str -> bool`), as
`property int` or `settable property int`, or as an enumeration's number.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

# All that our code touches, and what Polygraphy does on the calls we make.
CLASSES = (
    "Builder", "BuilderFlag", "DataType", "Dims", "EngineInspector", "EngineStat", "ErrorCodeTRT",
    "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine",
    "IExecutionContext", "IHostMemory", "ILogger", "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor",
    "IRuntimeConfig", "IStreamReader", "IStreamReaderV2", "ITensor", "ITimingCache", "LayerInformationFormat", "Logger",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserFlag", "OnnxParserRefitter",
    "PreviewFeature", "ProfilingVerbosity", "QuantizationFlag", "Refitter", "Runtime", "TacticSource",
    "TensorIOMode", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy",
)  # fmt: skip
_SPECIAL = ("__init__", "__len__", "__getitem__", "__bool__", "__iter__")
Facts = Mapping[str, Mapping[str, str]]


def of(module: Any) -> dict[str, dict[str, str]]:
    """Class -> member -> what it is; under `module` the names that are no classes of ours."""
    found = {name: _members(getattr(module, name)) for name in CLASSES if hasattr(module, name)}
    nested = {"ILogger.Severity": _members(module.ILogger.Severity)}
    return dict(sorted((found | nested).items()))


def _members(kind: Any) -> dict[str, str]:
    if hasattr(kind, "__members__"):
        return {name: str(int(value.value)) for name, value in sorted(kind.__members__.items())}
    members = {}
    for name in sorted({name for base in kind.__mro__ if base is not object for name in vars(base)}):
        if name.startswith("_") and name not in _SPECIAL:
            continue
        if kind.__name__ == "INetworkDefinition" and name.startswith("add_"):  # layers are the parser's affair
            continue
        member = next(vars(base)[name] for base in kind.__mro__ if name in vars(base))
        if (said := _said(name, member)) is not None:
            members[name] = said
    return members


def _said(name: str, member: Any) -> str | None:
    if isinstance(member, property):
        kind = _plain((member.fget.__doc__ or "").rpartition("->")[2].strip() or "Any")
        return f"{'settable ' if member.fset else ''}property {kind}"
    if not callable(member) or isinstance(member, type) or "->" not in (member.__doc__ or ""):
        return None
    lines = [line for line in member.__doc__.splitlines() if re.match(rf"^(\d+\. )?{re.escape(name)}\(self", line)]
    return " | ".join(map(_signature, lines)) or None


def _signature(line: str) -> str:
    """`name: str, size: int = ... -> bool`; without self, and without what a default is."""
    arguments, _, returned = re.sub(r"^(\d+\. )?\w+", "", line).rpartition(" -> ")
    parts = _split(arguments.removeprefix("(")[:-1])[1:]
    kept = [re.sub(r" = .*", " = ...", part, flags=re.DOTALL).strip() for part in parts]
    return f"{_plain(', '.join(kept))} -> {_plain(returned)}".strip()


def _split(arguments: str) -> list[str]:
    """At the commas that lie in no bracket."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _plain(text: str) -> str:
    """Without modules; what pybind11's versions spell differently in one spelling."""
    text = re.sub(r"\b(\w+_bindings\.\w+|typing|typing_extensions|collections\.abc|numpy)\.", "", text)
    for old, new in {"SupportsInt": "int", "SupportsFloat": "float", "List[": "list[", "Tuple[": "tuple["}.items():
        text = text.replace(old, new)
    return text.replace("CapsuleType", "capsule").replace("buffer", "Buffer") if "_buffer" not in text else text


def merged(versions: Mapping[str, Facts]) -> dict[str, Any]:
    """One table of all versions' facts: class -> member -> what it is -> the versions; `*` means all of them."""
    table: dict[str, dict[str, dict[str, list[str]]]] = {}
    for version, facts in versions.items():
        for kind, members in facts.items():
            for name, said in members.items():
                table.setdefault(kind, {}).setdefault(name, {}).setdefault(said, []).append(version)
    everywhere = list(versions)
    return {
        "versions": everywhere,
        "classes": {
            kind: {
                name: {said: "*" if where == everywhere else where for said, where in found.items()}
                for name, found in sorted(members.items())
            }
            for kind, members in sorted(table.items())
        },
    }


def at(table: Mapping[str, Any], version: str) -> dict[str, dict[str, str]]:
    """One version's facts out of the table of all."""
    assert version in table["versions"], f"no facts of TensorRT {version}"
    found = {
        kind: {
            name: said
            for name, variants in members.items()
            for said, where in variants.items()
            if where == "*" or version in where
        }
        for kind, members in table["classes"].items()
    }
    return {kind: members for kind, members in found.items() if members}


if __name__ == "__main__":
    print(json.dumps(of(importlib.import_module(sys.argv[1]))))
