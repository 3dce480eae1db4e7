"""Which engine of a bundle runs on a machine, by its GPU and its TensorRT, which need not be here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import BuildError, MissingRequirement
from dinoexport.runtime import engine_header
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Runtime
from dinoexport.system.hardware import Gpu


def gpu(capability: str, name: str = "NVIDIA L4") -> Gpu:
    return Gpu(index=0, name=name, uuid="GPU", compute_capability=capability, memory_bytes=1, driver="580.65")


def engine(**changes: Any) -> Any:
    facts = {
        "graph": "model", "file": "model.plan", "runtime": Runtime.TENSORRT, "runtime_version": "10.13.2.1",
        "compute_capabilities": ("8.9",), "compatibility": "same-cc", "device": "", "version_compatible": False,
    }  # fmt: skip
    return SimpleNamespace(**(facts | changes))


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _facts: "10.13.2.9")


@pytest.mark.parametrize(
    ("changes", "here", "why"),
    [
        ({}, gpu("8.9"), ""),
        ({}, gpu("8.0"), "model.plan is for SM 8.9; this machine has NVIDIA L4, SM 8.0."),
        ({"compatibility": "ampere+"}, gpu("8.0"), ""),
        ({"compatibility": "ampere+"}, gpu("8.6"), ""),
        ({"compatibility": "ampere+"}, gpu("7.5"), "model.plan is for SM 8.9; this machine has NVIDIA L4, SM 7.5."),
        ({"compatibility": "this-gpu", "device": "NVIDIA L4"}, gpu("8.9"), ""),
        ({"compatibility": "this-gpu", "device": ""}, gpu("8.9"), ""),
        (
            {"compatibility": "this-gpu", "device": "NVIDIA L40"},
            gpu("8.9"),
            "model.plan was built on NVIDIA L40 and runs only on that model; this machine has NVIDIA L4.",
        ),
        ({"compatibility": "same-cc", "device": "NVIDIA L40"}, gpu("8.9"), ""),
    ],
)
def test_an_engine_runs_on_the_cards_it_was_made_for(changes: dict[str, Any], here: Gpu, why: str) -> None:
    if why:
        with pytest.raises(MissingRequirement) as caught:
            engine_header.check_runs_here(engine(**changes), [here])
        assert caught.value.message == why
    else:
        assert engine_header.check_runs_here(engine(**changes), [here, gpu("1.0")]) is here


@pytest.mark.parametrize(
    ("built", "compatible", "runs"),
    [
        ("10.13.2.1", False, True), ("10.13.1", False, False), ("10.13.1", True, True), ("10.13.2", True, True),
        ("10.13.3", True, False), ("9.99.99", True, True),
    ],
)  # fmt: skip
def test_a_plan_loads_in_its_own_version_or_in_newer_ones_if_it_was_made_so(
    built: str, compatible: bool, runs: bool
) -> None:
    asked = engine(runtime_version=built, version_compatible=compatible)
    if runs:
        engine_header.check_runs_here(asked, [gpu("8.9")])
    else:
        words = rf"^model.plan was built by tensorrt {built}; this machine has 10.13.2.9\."
        with pytest.raises(MissingRequirement, match=words):
            engine_header.check_runs_here(asked, [gpu("8.9")])


def test_without_its_runtime_or_a_gpu_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingRequirement, match=r"model\.plan was not run: no GPU here") as caught:
        engine_header.check_runs_here(engine(compute_capabilities=("8.6", "8.9")), [])
    assert caught.value.next_step == "Validate it on a GPU of SM 8.6, 8.9."
    monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _facts: None)
    with pytest.raises(MissingRequirement, match=r"needs tensorrt 10.13.2.1, which is not installed") as caught:
        engine_header.check_runs_here(engine(), [gpu("8.9")])
    assert caught.value.next_step == "pip install 'dinoexport[tensorrt]'"


def test_of_several_cards_engines_each_graphs_first_that_runs_is_taken() -> None:
    wanted = [
        engine(graph=graph, file=f"{graph}-{capability}.plan", compute_capabilities=(capability,))
        for graph in ("step", "prefill")
        for capability in ("8.6", "8.9", "8.9")
    ]
    assert engine_header.for_this_machine(wanted, [gpu("8.9")]) == (wanted[1], wanted[4])
    with pytest.raises(MissingRequirement) as caught:
        engine_header.for_this_machine(wanted[:2], [gpu("8.0")])
    assert caught.value.message == (
        "step-8.6.plan is for SM 8.6; this machine has NVIDIA L4, SM 8.0. "
        "step-8.9.plan is for SM 8.9; this machine has NVIDIA L4, SM 8.0."
    )
    assert caught.value.next_step == "Compile the bundle on this card too."
    with pytest.raises(MissingRequirement) as caught:
        engine_header.for_this_machine(wanted[:1], [gpu("8.0")])
    assert caught.value.next_step == "Build a bundle for this GPU."
    with pytest.raises(MissingRequirement, match=r"^step-8.6.plan was not run: no GPU here\.$"):
        engine_header.for_this_machine(wanted[:2], [])


def rtx(*, size_bytes: int = 80, mask: int = 0b100101, weight_bytes: int = 7) -> bytes:
    """The beginning of a TensorRT-RTX engine: its size at 16, version at 24, targets at 32, weights at 56."""
    start = b"vtrt" + bytes(12) + size_bytes.to_bytes(8, "little") + bytes((1, 7, 0, 23)) + bytes(4)
    return start + mask.to_bytes(4, "little") + bytes(20) + weight_bytes.to_bytes(8, "little") + bytes(16)


def test_the_header_of_an_rtx_engine_says_its_size_cards_and_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.rtx"
    for mask, cards in ((0b100101, ("7.5", "8.6", "12.1")), (0b010, ("8.0",)), (0xFFFFFFC0, ())):
        path.write_bytes(rtx(mask=mask, weight_bytes=(1 << 40) + 7))
        assert engine_header.read_header(path) == engine_header.Header(
            runtime=Runtime.TENSORRT_RTX,
            version="1.7.0.23",
            size_bytes=80,
            compute_capabilities=cards,
            weight_bytes=(1 << 40) + 7,
        )
    for size in (79, 81, 1 << 40):
        path.write_bytes(rtx(size_bytes=size))
        with pytest.raises(BuildError) as caught:
            engine_header.read_header(path)
        assert caught.value.message == f"model.rtx is cut short: it declares {size} bytes and has 80."


def test_the_header_of_a_classic_plan_says_its_version(tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    plan = b"ftrt" + bytes(20) + bytes((11, 4, 0, 106)) + bytes(36)
    path.write_bytes(plan)
    assert engine_header.read_header(path) == engine_header.Header(runtime=Runtime.TENSORRT, version="11.4.0.106")
    for content, words in (
        (plan[:63], "is not a TensorRT engine."),
        (b"xtrt" + plan[4:], "is not a TensorRT engine."),
        (plan[:7] + b"\1" + plan[8:], "has a plan format that is not known here."),
    ):
        path.write_bytes(content)
        with pytest.raises(BuildError) as caught:
            engine_header.read_header(path)
        assert caught.value.message == f"model.plan {words}"
