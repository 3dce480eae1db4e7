"""What a bundle is validated with: what of it is opened, where it runs, what is compared, and what is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.spec import CPU_RUNTIMES, Precision, Runtime, silent
from dinoexport.validation import validate_bundle
from dinoexport.validation.validate_bundle import Validated

FOLDER = Path("bundle")
GRAPH: Any = SimpleNamespace(file="model.onnx", graph=lambda: "graph")
GRAPHS = {FOLDER / "model.onnx": "graph"}


def manifest_of(*engines: Runtime, target: str = "cpu", verdict: str = "passed") -> Any:
    return SimpleNamespace(
        engines=tuple(SimpleNamespace(runtime=runtime) for runtime in engines), target=target, verdict=verdict,
        graphs=(GRAPH,), precision=Precision.FP16, recipe={}, family="toy",
        changed=lambda **changes: ("changed", changes),
    )  # fmt: skip


# What is opened


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How a bundle is opened; `missing` is what a GPU lacks here."""
    facts: dict[str, Any] = {"missing": "", "on_gpu": [], "ways": []}

    def open_on_gpu(model: Any, folder: Path, manifest: Any, *, trusted: bool, named_by: Any) -> Any:
        facts["on_gpu"].append((trusted, named_by))
        if facts["missing"]:
            raise MissingRequirement(facts["missing"], next_step="x")
        return SimpleNamespace(candidate="on the GPU", name="its name", device="A100")

    runners = validate_bundle.runners
    monkeypatch.setattr(runners, "open_on_gpu", open_on_gpu)
    monkeypatch.setattr(runners, "way_of", lambda _manifest, runtime: facts["ways"].append(runtime) or "way")
    monkeypatch.setattr(runners, "candidate_name", lambda precision, way, ran: f"{precision} {way} {ran}")
    monkeypatch.setattr(runners, "driven", lambda _model, opened: ("driven", opened))
    monkeypatch.setattr(runners, "with_one_thread", lambda _model, graphs, way: (graphs, way))
    monkeypatch.setattr(validate_bundle.cpu, "open_graphs", lambda graphs, way: (graphs, way))
    monkeypatch.setattr(validate_bundle.cpu, "arithmetic", lambda _model, _opened, sample: sample)
    return facts


MODEL: Any = SimpleNamespace(workloads=(SimpleNamespace(inputs="most common"), SimpleNamespace(inputs="rare")))


@pytest.mark.parametrize(
    ("manifest", "runtime", "on_gpu", "device"),
    [
        (manifest_of(Runtime.TENSORRT, target="a100"), None, True, "A100"),
        (manifest_of(Runtime.TENSORRT, target="a100"), Runtime.TENSORRT, True, "A100"),
        (manifest_of(Runtime.TENSORRT, target="a100"), Runtime.OPENVINO, False, ""),
        (manifest_of(target="a100"), None, True, ""), (manifest_of(target="a100"), Runtime.ONNXRUNTIME, False, ""),
        (manifest_of(), None, False, ""), (manifest_of(), Runtime.OPENVINO, False, ""),
    ],
)  # fmt: skip
def test_what_a_bundle_has_for_a_gpu_runs_there_unless_a_cpus_runtime_is_named(
    manifest: Any, runtime: Runtime | None, on_gpu: bool, device: str, opening: dict[str, Any]
) -> None:
    """Only engines are recorded with the card they ran on."""
    found: Any = validate_bundle._open(FOLDER, manifest, MODEL, runtime, trusted=True)
    if on_gpu:
        assert (found.candidate, found.name, found.device) == ("on the GPU", "its name", device)
        assert opening["on_gpu"] == [(True, "most common")] and found.one_thread is None and opening["ways"] == []
    else:
        assert (found.candidate, found.name) == (("driven", (GRAPHS, "way")), "fp16 way most common")
        assert opening["ways"] == [runtime] and opening["on_gpu"] == [] and found.device == ""
        assert found.one_thread == (GRAPHS, "way")
    assert found.not_run == ""


def test_a_bundle_for_a_gpu_that_is_not_here_runs_on_the_cpu_and_says_so(opening: dict[str, Any]) -> None:
    """Unless its engines were asked for."""
    opening["missing"] = "There is no GPU here."
    manifest = manifest_of(Runtime.TENSORRT, target="a100")
    found = validate_bundle._open(FOLDER, manifest, MODEL, None, trusted=False)
    assert found.not_run == "There is no GPU here." and found.device == "" and opening["on_gpu"][0][0] is False
    with pytest.raises(MissingRequirement, match="no GPU here"):
        validate_bundle._open(FOLDER, manifest, MODEL, Runtime.TENSORRT, trusted=False)


def test_a_bundle_without_engines_of_a_runtime_says_what_it_has(opening: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^bundle holds nothing for tensorrt_rtx") as refused:
        validate_bundle._open(FOLDER, manifest_of(Runtime.TENSORRT), MODEL, Runtime.TENSORRT_RTX, trusted=False)
    assert refused.value.next_step == "It has: onnxruntime, openvino, tensorrt."
    for runtime in CPU_RUNTIMES:
        validate_bundle._open(FOLDER, manifest_of(), MODEL, runtime, trusted=False)


# What is compared


@pytest.mark.parametrize(
    ("device", "passed", "recorded"), [("A100", True, True), ("A100", False, False), ("", True, False)]
)
def test_engines_that_pass_are_recorded_with_their_card(
    device: str, passed: bool, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    report: Any = SimpleNamespace(passed=passed)
    evaluate = validate_bundle.evaluate
    monkeypatch.setattr(evaluate, "judged", lambda candidate, reference, name, progress: (candidate, reference, name))
    monkeypatch.setattr(
        evaluate, "with_determinism",
        lambda judged, *more: {(("candidate", "reference", "name"), "reference", "candidate", None): report}[
            (judged, *more)
        ],
    )  # fmt: skip
    monkeypatch.setattr(evaluate, "executed", lambda engines, device, report: f"on {device}")
    opened = validate_bundle._Opened(
        candidate="candidate", name="name", device=device, not_run="why",
    )  # fmt: skip
    manifest = manifest_of(Runtime.TENSORRT)
    reference: Any = "reference"
    found = validate_bundle._by_reference(manifest, opened, reference, silent)
    assert found.manifest == (("changed", {"engines": "on A100"}) if recorded else manifest)
    assert (found.report, found.not_run) == (report, "why")


class Judging:
    """`validate` of one bundle with stand-ins for all that runs, and what they were given."""

    def __init__(self, patch: pytest.MonkeyPatch, manifest: Any) -> None:
        self.calls: dict[str, Any] = {}
        self.report, self.with_ranges = SimpleNamespace(passed=True), SimpleNamespace(passed=True)
        self.given: list[Any] = []
        of_bundle = SimpleNamespace(expectations=(SimpleNamespace(case="its case"),), limits="its limits")
        evaluate, user_files, runners = validate_bundle.evaluate, validate_bundle.user_files, validate_bundle.runners

        @contextmanager
        def checked(folder: Path, **more: Any) -> Iterator[Any]:
            self.given.append(more["signed"])
            yield manifest

        def recorded(name: str, answer: Any) -> Any:
            return lambda *given, **more: self.calls.update({name: (*given, *more.values())}) or answer

        self.validated = Validated(manifest=manifest, report=self.report, not_run="why")
        patch.setattr(validate_bundle.bundle, "checked", checked)
        patch.setattr(validate_bundle, "parse", lambda *_, where: "recipe")
        patch.setattr(validate_bundle.family, "find", lambda _name: SimpleNamespace(model=lambda recipe: MODEL))
        self.opened = SimpleNamespace(not_run="why", candidate="candidate", name="name")
        patch.setattr(validate_bundle, "_open", recorded("open", self.opened))
        patch.setattr(validate_bundle.reference_file, "read", lambda path: of_bundle)
        patch.setattr(validate_bundle, "_by_reference", lambda *_: self.validated)
        patch.setattr(evaluate, "same_weights", recorded("weights", "checkpoint"))
        patch.setattr(evaluate, "with_ranges", recorded("ranges", self.with_ranges))
        patch.setattr(evaluate, "growth_of", recorded("growth", "growth"))
        patch.setattr(runners, "way_of", lambda _manifest, runtime: ("way", runtime))
        patch.setattr(user_files, "readable", lambda _m, _i, skipped, _p: skipped.append("x.txt: no image") or "cases")
        patch.setattr(user_files, "usable", lambda *_: "cases again")
        patch.setattr(validate_bundle, "_limits_of", lambda *_: "limits")
        self.aggregate = SimpleNamespace(report=self.report)
        patch.setattr(validate_bundle, "_judge_own", recorded("own", self.aggregate))

    def validate(self, **settings: Any) -> Validated:
        return validate_bundle.validate(FOLDER, weights="w", head_weights="h", **settings)


@pytest.mark.parametrize("explained", [False, True])
@pytest.mark.parametrize("runtime", [None, Runtime.OPENVINO, Runtime.TENSORRT])
def test_a_bundle_is_judged_by_its_own_reference(
    explained: bool, runtime: Runtime | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are needed only to explain an error: on its own cases, in the CPU's runtime that was named."""
    manifest = manifest_of(Runtime.TENSORRT)
    seen = Judging(monkeypatch, manifest)
    found = seen.validate(runtime=runtime, **({"explained": True} if explained else {}))
    assert seen.calls["open"] == (FOLDER, manifest, MODEL, runtime, False)
    if not explained:
        assert found == seen.validated and set(seen.calls) == {"open"}
        return
    way = ("way", Runtime.OPENVINO if runtime is Runtime.OPENVINO else None)
    assert seen.calls["weights"] == (MODEL, "recipe", manifest, "w", silent, "h", FOLDER)
    assert seen.calls["ranges"] == (seen.report, MODEL, GRAPHS, ["its case"], silent)
    assert seen.calls["growth"] == (
        seen.with_ranges, ["its case"], MODEL, GRAPHS, "checkpoint", "its limits", way, Precision.FP16, silent,
    )  # fmt: skip
    assert (found.growth, found.way, found.report) == ("growth", way, seen.with_ranges)


@pytest.mark.parametrize("explained", [False, True])
@pytest.mark.parametrize("verdict", ["passed", "unjudged"])
def test_a_users_images_are_judged_by_pytorch(explained: bool, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bundle without a reference too; an error is explained on the images themselves."""
    manifest = manifest_of(verdict=verdict)
    seen = Judging(monkeypatch, manifest)
    found = seen.validate(images=Path("photos"), **({"explained": True} if explained else {}))
    assert seen.calls["weights"] == (MODEL, "recipe", manifest, "w", silent, "h", FOLDER)
    assert seen.calls["own"] == (
        seen.opened, MODEL, "checkpoint", "cases", GRAPHS, manifest, "limits", "plain", silent,
    )  # fmt: skip
    assert (found.skipped, found.aggregate, found.not_run) == (("x.txt: no image",), seen.aggregate, "why")
    assert found.growth == ("growth" if explained else None)
    if explained:
        assert seen.calls["growth"][:2] == (seen.report, "cases again") and seen.calls["growth"][5] == "limits"
    assert "ranges" not in seen.calls


def test_a_bundle_without_a_reference_is_not_judged_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Judging(monkeypatch, manifest_of(verdict="unjudged"))
    with pytest.raises(UsageError, match=r"^bundle was exported without a reference"):
        seen.validate()


@pytest.mark.parametrize("verdict", ["passed", "rejected", "unjudged"])
def test_the_limits_of_a_users_images(verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the bundle was judged by, else those of its recipe."""
    monkeypatch.setattr(validate_bundle, "load_validation", lambda name, beside: (f"limits for {name}", None))
    monkeypatch.setattr(validate_bundle.evaluate, "limits_for", lambda validation, precision: (validation, precision))
    monkeypatch.setattr(validate_bundle.reference_file, "read", lambda path: SimpleNamespace(limits=f"of {path}"))
    recipe: Any = SimpleNamespace(judged_by="dinov2")
    found: Any = validate_bundle._limits_of(FOLDER, manifest_of(verdict=verdict), recipe)
    assert found == (("limits for dinov2", Precision.FP16) if verdict == "unjudged" else "of bundle/reference.npz")


# What is recorded


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("signed", [None, "a signed manifest"])
def test_code_in_a_plan_runs_if_its_author_is_known_or_trusted(
    plan: bool, signed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Judging(monkeypatch, manifest_of())
    seen.validate(trust_plan=plan, signed=signed)
    assert seen.calls["open"][-1] is (plan or signed is not None) and seen.given == [signed]


@pytest.mark.parametrize(
    ("passed", "signs", "changed", "record", "expected"),
    [
        (True, True, True, True, (True, "", "signed")), (True, True, False, True, (False, "", "signed")),
        (False, True, False, True, (False, "", None)), (True, False, False, True, (False, "", None)),
        (True, False, True, True, (True, "", "recorded")), (False, False, True, True, (True, "", "recorded")),
        (True, False, True, False, (False, "Not recorded: the bundle is in an object store.", None)),
    ],
)  # fmt: skip
def test_a_verdict_is_recorded_and_what_passed_is_signed(
    passed: bool, signs: bool, changed: bool, record: bool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, after = manifest_of(), manifest_of()
    seen = Judging(monkeypatch, manifest)
    seen.report.passed = passed
    written: list[Any] = [None]

    def rewrite(folder: Path, *, before: Any, after: Any, sign: Any = None) -> None:
        written.append("recorded" if sign is None else sign)

    monkeypatch.setattr(validate_bundle.bundle, "rewrite", rewrite)
    if changed:
        seen.validated = Validated(manifest=after, report=seen.report)
    signer: Any = SimpleNamespace(signature="signed") if signs else None
    found = seen.validate(signer=signer, record=record)
    assert (found.recorded, found.not_recorded, written[-1]) == expected
