"""Our code and the stand-ins use what TensorRT's bindings have, version by version, by the table of facts.

`test_bindings.py` holds the table to the bindings themselves, where they can be loaded.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.standin import bindings, compiler, face, facts, gpu

ROOT = Path(__file__).parents[2]
TABLE = json.loads(bindings.TABLE.read_text())
CLASSIC = {version: facts.at(TABLE, version) for version in TABLE["versions"] if not version.startswith("rtx-")}
RTX = facts.at(TABLE, face.RTX)
# Which class of TensorRT's our variables hold.
VARIABLES = {
    "opened": "ICudaEngine", "_opened": "ICudaEngine", "context": "IExecutionContext", "opener": "Runtime",
    "refitter": "Refitter", "parser": "OnnxParserRefitter", "config": "IRuntimeConfig", "inspector": "EngineInspector",
    "made": "IBuilderConfig", "flags": "BuilderFlag", "severity": "ILogger.Severity",
    "kernels": "DynamicShapesKernelSpecializationStrategy",
}  # fmt: skip
MODULES = ("trt", "_trt", "module")
FILES = ("engines/worker.py", "engines/inspector.py", "runtime/trt.py", "runtime/weight_streaming.py")
# What one flavour alone has; our code asks first which it drives.
RTX_ONLY = {
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
}
# What some versions lack; our code expects that.
EXPECTED_TO_LACK = {("ICudaEngine", "get_engine_stat")}


def used_in(source: str) -> set[tuple[str, str, int | None, tuple[str, ...]]]:
    """(class, member, positional arguments of a call, its keywords) for all that `source` asks of TensorRT."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        kind = _kind(node.value)
        call = calls.get(id(node))
        if kind is None or node.attr.startswith("_"):
            continue
        args = None if call is None else len(call.args)
        if call is not None and any(isinstance(arg, ast.Starred) for arg in call.args):
            args = None
        keywords = () if call is None else tuple(keyword.arg or "" for keyword in call.keywords)
        found.add((kind, node.attr, args, keywords))
    return found


def _kind(node: ast.expr) -> str | None:
    """The class an expression holds; `module` for TensorRT itself."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_trt":
        return "module"
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    if name in MODULES:
        return "module"
    if isinstance(node, ast.Attribute) and (outer := _kind(node.value)) is not None:
        return name if outer == "module" else f"{outer}.{name}"
    return VARIABLES.get(name)


USED = sorted(
    {found for file in FILES for found in used_in((ROOT / "dinoexport" / file).read_text())},
    key=lambda found: (found[0], found[1], str(found[2:])),
)


def test_enough_is_looked_at() -> None:
    """A check of nothing would pass."""
    members = {(kind, name) for kind, name, _, _ in USED}
    assert {
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "update_device_memory_size_for_shapes"),
        ("IExecutionContext", "set_tensor_address"),
        ("Runtime", "deserialize_cuda_engine"),
        ("Runtime", "engine_host_code_allowed"),
        ("HardwareCompatibilityLevel", "AMPERE_PLUS"),
        ("BuilderFlag", "REFIT_IDENTICAL"),
        ("IBuilderConfig", "progress_monitor"),
        ("module", "IProgressMonitor"),
    } | RTX_ONLY <= members
    assert len(members) > 45


@pytest.mark.parametrize(("kind", "name", "args", "keywords"), USED)
def test_our_code_uses_what_every_version_has(
    kind: str, name: str, args: int | None, keywords: tuple[str, ...]
) -> None:
    versions = {face.RTX: RTX} if (kind, name) in RTX_ONLY or (kind in dict(RTX_ONLY) and kind[0] in "CD") else CLASSIC
    if "compatibility" not in name and kind != "HardwareCompatibilityLevel":
        versions = versions | {face.RTX: RTX}
    for version, known in versions.items():
        if (kind, name) in EXPECTED_TO_LACK and name not in known[kind]:
            continue
        if f"{kind}.{name}" in known:  # a class inside a class
            continue
        if kind == "module":
            assert name in known or name in ("__version__", "CudaGraphStrategy", *_RTX_CLASSES), (version, name)
            said = known.get(name, {}).get("__init__", "")
        else:
            assert name in known.get(kind, {}), (version, kind, name)
            said = known[kind][name]
        if args is not None and "->" in said:
            assert _takes(said, args, keywords), (version, kind, name, said)


_RTX_CLASSES = ("DynamicShapesKernelSpecializationStrategy",)


def _takes(said: str, args: int, keywords: tuple[str, ...]) -> bool:
    """Whether an overload has as many arguments, and those by name."""
    return any(
        len(overload) >= args + len(keywords)
        and set(keywords) <= {name for name, _, _ in overload[args:]}
        and all(optional or name in keywords for name, _, optional in overload[args:])
        for overload in face._overloads(said)
    )


STAND_INS = {
    gpu.Runtime: "Runtime", gpu.Opened: "ICudaEngine", gpu.Context: "IExecutionContext",
    gpu.RuntimeConfig: "IRuntimeConfig", gpu.Inspector: "EngineInspector", gpu.Refitter: "Refitter",
    gpu.OnnxParserRefitter: "OnnxParserRefitter", compiler.Network: "INetworkDefinition", compiler.Tensor: "ITensor",
    compiler.OnnxParser: "OnnxParser", compiler.OptimizationProfile: "IOptimizationProfile",
    compiler.TimingCache: "ITimingCache", compiler.Config: "IBuilderConfig", compiler.Builder: "Builder",
}  # fmt: skip


@pytest.mark.parametrize(("stand_in", "kind"), STAND_INS.items(), ids=str)
def test_a_stand_in_takes_what_the_bindings_take(stand_in: type, kind: str) -> None:
    """Argument by argument, in every version that has the member: it must not allow what the real one refuses."""
    checked = 0
    for known in (*CLASSIC.values(), RTX):
        for name, member in vars(stand_in).items():
            said = known.get(kind, {}).get(name)
            if said is None or name.startswith("_") or not callable(member):
                continue
            own = list(member.__code__.co_varnames[1 : member.__code__.co_argcount])
            overloads = [[argument for argument, _, _ in overload] for overload in face._overloads(said)]
            alike = own in overloads or (own == ["how"] and name == "create_execution_context")
            assert alike, f"{kind}.{name}{own}: {said}"
            checked += 1
    assert checked or not [name for name, member in vars(stand_in).items() if callable(member) and name[0] != "_"]


@pytest.mark.parametrize("version", [face.VERSIONS[0], face.VERSIONS[1], face.VERSIONS[-1]])
def test_the_compilers_stand_in_has_no_more_than_its_version(version: str) -> None:
    """`standin/tensorrt`, in a process of its own, compared class by class."""
    script = (
        "import json, tensorrt\n"
        "own = ('Runtime', 'ICudaEngine', 'EngineInspector')\n"
        "import inspect\n"
        "print(json.dumps({'version': tensorrt.__version__, 'names': sorted(n for n in dir(tensorrt) if n[0] != '_'),\n"
        " 'own': {k: {n: list(inspect.signature(m).parameters)[1:] for n, m in vars(getattr(tensorrt, k)).items()\n"
        "  if n[0] != '_' and callable(m)} for k in own},\n"
        " 'members': {k: sorted(n for n in dir(getattr(tensorrt, k)) if n.isupper())\n"
        "  for k in ('BuilderFlag', 'NetworkDefinitionCreationFlag')}}))"
    )
    folder = str(Path(__file__).parents[1] / "standin")
    environment = {**os.environ, "PYTHONPATH": folder, "STANDIN_TENSORRT": version}
    shown = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(shown.stdout)
    known = CLASSIC[version]
    assert version.startswith(found["version"])
    extra = set(found["names"]) & set(facts.CLASSES) - known.keys()
    assert not extra, extra
    for kind, members in found["own"].items():
        for name, arguments in members.items():
            assert arguments in [[a for a, _, _ in overload] for overload in face._overloads(known[kind][name])]
    assert set(found["members"]["BuilderFlag"]) <= known["BuilderFlag"].keys()
    assert set(found["members"]["NetworkDefinitionCreationFlag"]) == known["NetworkDefinitionCreationFlag"].keys()


def test_a_face_refuses_what_the_bindings_refuse() -> None:
    """The failures that are known of the real modules, in a 10.x and an 11.x face."""
    device = gpu.Device()
    old, new = (face.tensorrt(version, device) for version in (face.VERSIONS[0], face.VERSIONS[-1]))
    for module in (old, new):
        with pytest.raises(TypeError):
            module.Logger(1)
        with pytest.raises(TypeError):
            module.Runtime(None)
        with pytest.raises(TypeError):
            module.Runtime(module.Logger()).deserialize_cuda_engine(serialised=b"")
        with pytest.raises(AttributeError):
            module.Runtime(module.Logger()).get_engine_validity(b"")
        with pytest.raises(AttributeError):
            _ = module.ICudaEngine.create_weights_manager
        assert module.Runtime(module.Logger()).engine_host_code_allowed is False
    assert hasattr(old.ICudaEngine, "device_memory_size") and not hasattr(new.ICudaEngine, "device_memory_size")
    assert int(old.BuilderFlag.STRIP_PLAN) == 19 and int(new.BuilderFlag.STRIP_PLAN) == 18
    assert not hasattr(new.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    assert not hasattr(old.ICudaEngine, "get_engine_stat")
    fourteen = face.tensorrt(face.VERSIONS[1], device)
    engine = object.__new__(fourteen.ICudaEngine)
    with pytest.raises(TypeError, match="weak reference"):
        engine.get_engine_stat()
