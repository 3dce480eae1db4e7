"""What PyTorch is asked for, what is kept of its answers, and which weights are a bundle's own."""

from __future__ import annotations

from contextlib import nullcontext
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport.config.limits import Limit, Limits, Validation
from dinoexport.errors import MissingRequirement, UsageError, ValidationFailed
from dinoexport.runtime import runners
from dinoexport.spec import Case, Expectation, Graph, Precision, Tensor
from dinoexport.validation import evaluate, judge, validate_bundle

REASON = "a number for a test, chosen by hand"


def limits(**values: float) -> Limits:
    given = {"relative_l2_max": 9.0, "worst_l2_max": 9.0} | values
    return Limits(**{name: Limit(value=value, reason=REASON) for name, value in given.items()})


def case(name: str, **facts: Any) -> Case:
    return Case(name=name, why="a test", inputs={"x": np.array([float(len(name))])}, **facts)


class Oracle:
    """PyTorch's answers by precision; `asked` is what was asked for."""

    def __init__(self, exact: Any, lossy: Any) -> None:
        self.answers = {Precision.FP32: exact, Precision.FP16: lossy}
        self.asked: list[Any] = []

    def reference(self, read: Any, inputs: Any, *, precision: Precision, progress: Any) -> Any:
        self.asked.append((precision, len(inputs)))
        return [dict(self.answers[precision]) for _ in inputs]

    def upstream(self, read: Any, inputs: Any, *, progress: Any) -> Any:
        self.asked.append(("upstream", len(inputs)))
        return [dict(self.answers[Precision.FP32]) for _ in inputs]


EXACT = {"tokens": np.array([[3.0, 4.0]]), "labels": np.array([[1, 3000]]), "labels/lead": np.array([[0.5, 0.25]])}
LOSSY = {"tokens": np.array([[3.0, 4.5]]), "labels": np.array([[1, 3001]]), "labels/lead": np.array([[0.5, 0.0]])}
KINDS: Any = {"labels": ("labels", "logits")}


def computed(oracle: Oracle, held_to: Limits, *cases: Case, judge_code: Any = "plain") -> Any:
    return evaluate.compute_reference(
        oracle, SimpleNamespace(read=None), cases, held_to, precision=Precision.FP16, judge_code=judge_code,  # type: ignore[arg-type]
        kinds=KINDS,
    )  # fmt: skip


def test_a_reference_of_every_case_that_is_answered() -> None:
    """Leads lie beside the labels; PyTorch's own error and outputs are kept only where limits are a multiple of it."""
    oracle = Oracle(EXACT, LOSSY)
    cases = (case("shown", shown=True), case("plain"), case("refused", expect_refusal=True))
    found = computed(oracle, limits(times_own_error_max=2.0), *cases)
    assert oracle.asked == [(Precision.FP32, 2), (Precision.FP16, 2)]
    assert [e.case for e in found.expectations] == list(cases[:2]) and found.refusals == cases[2:]
    shown, plain = found.expectations
    for each in (shown, plain):
        assert each.outputs.keys() == {"tokens", "labels"} and each.leads["labels"].tolist() == [[0.5, 0.25]]
        assert each.own_error == {"tokens": pytest.approx(0.1)}
    assert plain.own_outputs == {} and shown.own_outputs.keys() == {"tokens", "labels"}
    assert shown.own_outputs["tokens"].dtype == np.float16 and shown.own_outputs["tokens"].tolist() == [[3.0, 4.5]]
    assert shown.own_outputs["labels"].tolist() == [[1, 3001]], "whole numbers stay: fp16 has those up to 2048"
    assert found.kinds == KINDS and found.name.startswith("PyTorch fp32, plain upstream formulation (torch ")
    oracle = Oracle(EXACT, LOSSY)
    found = computed(oracle, limits(), *cases, judge_code="hub")
    assert oracle.asked == [("upstream", 2)] and found.name.startswith("PyTorch fp32, the authors' own code (torch ")
    assert [(e.own_error, e.own_outputs) for e in found.expectations] == [({}, {})] * 2


def test_what_overflows_is_no_error_of_its_own() -> None:
    """Of choices there is none either; of distributions the error of the centred logits, and the divergence."""
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    exact = {"logits": np.stack([[p, p]]), "choice": np.array([[0, 0]]), "wide": np.array([[1.0]])}
    ours = {"logits": np.stack([[q + 7, q]]), "choice": np.array([[1, 0]]), "wide": np.array([[np.inf]])}
    oracle = Oracle(exact, ours)
    asked = case("one", distributions=("logits",), choices={"choice": "logits"})
    (found,) = computed(oracle, limits(times_own_error_max=2.0), asked).expectations
    centred_p, centred_q = p - p.mean(), q - q.mean()
    assert found.own_error == {
        "logits": pytest.approx(np.linalg.norm(centred_p - centred_q) / np.linalg.norm(centred_p)),
        "logits/kl": pytest.approx(0.25 * log(2)),
    }
    assert judge.own_kl("logits") == "logits/kl"


def test_kinds_and_limits() -> None:
    outputs = tuple(
        Tensor(name=name, dtype="float32", shape=(), meaning="", kind=kind, decided_by=by)  # type: ignore[arg-type]
        for name, kind, by in (("a", "vectors", ""), ("b", "labels", "c"), ("c", "maps", ""))
    )
    graph = Graph(name="model", inputs=(), outputs=outputs, dims=())
    assert evaluate.kinds_of([graph]) == {"b": ("labels", "c"), "c": ("maps", "")}
    validation = Validation(limits={Precision.FP32: limits()}, cases=({"name": "one"}, {"name": "two"}))
    assert evaluate.limits_for(validation, Precision.FP32) == limits()
    with pytest.raises(UsageError, match="has no limits for fp16"):
        evaluate.limits_for(validation, Precision.FP16)
    model: Any = SimpleNamespace(case=lambda table, folder: (table["name"], folder.name))
    assert evaluate.cases_of(model, validation, Path("here")) == (("one", "here"), ("two", "here"))


# Which weights


def opened(
    monkeypatch: pytest.MonkeyPatch, weights: str | None = None, *, made: Any = None, head: Any = None,
    found: str = "same", found_head: Any = None, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """How the checkpoint is opened. made: of the bundle; found: the hash of what is opened."""
    asked: dict[str, Any] = {}

    def open_checkpoint(_model: Any, _recipe: Any, source: Any, **options: Any) -> Any:
        del options["progress"]
        asked.update({"source": source} | options)
        return SimpleNamespace(source="what was given", sha256=found, head=found_head)

    monkeypatch.setattr(evaluate, "open_checkpoint", open_checkpoint)
    recipe: Any = SimpleNamespace(
        weights=(SimpleNamespace(sha256="published", url="https://x/w"), SimpleNamespace(sha256="other", url="")),
        heads={"nyu": SimpleNamespace(url="https://x/head")},
    )
    facts = {"source": "my.pth", "sha256": "same", "prefix": "backbone."} | (made or {})
    manifest: Any = SimpleNamespace(checkpoint=SimpleNamespace(**facts), head=head)
    evaluate.same_weights(None, recipe, manifest, weights, lambda *_: None, **how)  # type: ignore[arg-type]
    return asked


@pytest.mark.parametrize(
    ("weights", "made", "source", "prefix"),
    [
        (None, {}, "my.pth", "backbone."), ("given.pth", {}, "given.pth", "backbone."),
        (None, {"source": "https://x/w"}, None, None), (None, {"sha256": "published"}, None, None),
        ("given.pth", {"source": "https://x/w"}, "given.pth", "backbone."),
        (None, {"source": "synthetic:0"}, "synthetic:0", None), ("synthetic:1", {}, "synthetic:1", None),
    ],
)  # fmt: skip
def test_where_a_bundles_weights_are(
    weights: str | None, made: Any, source: str | None, prefix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published ones are downloaded; names have a prefix only in files of a user."""
    found = opened(monkeypatch, weights, made=made, found=made.get("sha256", "same"))
    assert found == {"source": source, "prefix": prefix, "head_source": None}


def head_of(**facts: Any) -> Any:
    return SimpleNamespace(**({"kind": "nyu", "sha256": "h", "source": "my_head.pth", "file": ""} | facts))


@pytest.mark.parametrize(
    ("head", "how", "source"),
    [
        (head_of(), {}, "my_head.pth"), (head_of(), {"head_weights": "given.pth"}, "given.pth"),
        (head_of(sha256=None), {}, None), (head_of(source="https://x/head"), {}, None),
        (head_of(source="https://x/head", kind="unheard"), {}, "https://x/head"),
        (head_of(file="head.safetensors"), {"folder": Path("b")}, "b/head.safetensors"),
        (head_of(file="head.safetensors"), {}, "my_head.pth"), (head_of(), {"folder": Path("b")}, "my_head.pth"),
    ],
)  # fmt: skip
def test_where_a_bundles_head_is(head: Any, how: Any, source: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the bundle, in the file it came from, or published."""
    assert opened(monkeypatch, head=head, **how)["head_source"] == source


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationFailed, match=r"^what was given is not what the bundle was built from: my\.pth, SHA"):
        opened(monkeypatch, found="other")
    same, other = SimpleNamespace(source="a", sha256="h"), SimpleNamespace(source="a", sha256="i")
    opened(monkeypatch, head=head_of(), found_head=same)
    opened(monkeypatch, head=None, found_head=other)
    opened(monkeypatch, head=head_of(), found_head=None)
    with pytest.raises(ValidationFailed, match=r"^a is not the head that the bundle was built from: my_head\.pth, SHA"):
        opened(monkeypatch, head=head_of(), found_head=other)


# Engines


class Facts(SimpleNamespace):
    def changed(self, **found: Any) -> Facts:
        return Facts(**vars(self) | found)


@pytest.mark.parametrize("passes", [True, False])
def test_engines_that_ran_have_a_report_and_those_that_passed_a_device(
    passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = Facts(file="here"), Facts(file="elsewhere")
    trusts: list[bool] = []

    def open_engines(_model: Any, engines: Any, _graphs: Any, *, trusted: bool) -> Any:
        trusts.append(trusted)
        answer = {"tokens": np.array([[3.0, 4.0 if passes else 40.0]])}
        return runners.OnGpu(candidate=lambda _inputs: answer, name="here on A100", device="A100")

    monkeypatch.setattr(runners, "open_engines", open_engines)
    monkeypatch.setattr(runners, "engines_here", lambda facts: [f for f in facts if f.file == "here"])
    expectation = Expectation(case=case("one"), outputs={"tokens": np.array([[3.0, 4.0]])})
    reference = evaluate.Reference(
        name="r", limits=limits(relative_l2_max=0.1), expectations=(expectation,), refusals=()
    )
    engines: Any = {Path("a"): elsewhere, Path("b"): here}
    found = evaluate.judge_engines(None, engines, {}, reference)  # type: ignore[arg-type]
    assert trusts == [True] and found.report is not None and found.report.candidate == "here on A100"
    assert found.report.determinism is not None and found.report.passed is passes
    left, ran = found.facts
    assert left is elsewhere and ran.report["passed"] is passes  # type: ignore[index]
    assert getattr(ran, "executed", "never").startswith("on A100 at 20") is passes

    def absent(*_: Any, **__: Any) -> Any:
        raise MissingRequirement("no GPU", next_step="")

    monkeypatch.setattr(runners, "open_engines", absent)
    found = evaluate.judge_engines(None, engines, {}, reference)  # type: ignore[arg-type]
    assert (found.facts, found.report, found.not_run) == ((elsewhere, here), None, "no GPU")


# Distributions and refusals, judged


def rows(answers: Any, expectation: Expectation, held_to: Limits, kinds: Any = None) -> dict[str, judge.Row]:
    report = judge.judge(
        lambda _: answers, (expectation,), (), held_to, candidate_name="c", reference_name="r", kinds=kinds or {}
    )
    return {row.output: row for row in report.rows}


def test_distributions_have_limits_of_their_own() -> None:
    """Twice PyTorch's own error is four times its divergence."""
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    expectation = Expectation(
        case=case("one", distributions=("logits",), choices={"choice": "logits"}),
        outputs={"logits": np.array([[p, p]]), "choice": np.array([[0, 0]])},
        own_error={"logits": 0.25, "logits/kl": 0.01},
    )
    held_to = limits(kl_mean_max=0.1, kl_worst_max=0.2, top1_gap_max=0.5, top1_kept_min=0.75, times_own_error_max=2.0)
    found = rows({"logits": np.array([[p, q]]), "choice": np.array([[0, 1]])}, expectation, held_to)
    kl = 0.25 * log(2)
    bounds = [(b.figure, b.value, b.limit, b.holds) for b in found["logits"].bounds]
    assert bounds[2:] == [
        ("relative_l2", pytest.approx(bounds[0][1]), 0.5, False), ("kl_mean", pytest.approx(kl / 2), 0.1, True),
        ("kl_worst", pytest.approx(kl), 0.2, True), ("top1_gap", pytest.approx(log(2)), 0.5, False),
        ("top1_kept", 0.5, 0.75, False), ("kl_mean", pytest.approx(kl / 2), 0.04, False),
    ]  # fmt: skip
    assert found["logits"].divergence is not None
    (gap,) = found["choice"].bounds
    assert (gap.figure, gap.value, gap.holds) == ("top1_gap", pytest.approx(log(2)), False)
    plain = rows({"logits": np.array([[p, p]]), "choice": np.array([[0, 0]])}, expectation, limits(top1_gap_max=0.5))
    assert [(b.figure, b.value) for b in plain["choice"].bounds] == [("top1_gap", 0.0)]
    assert [b.figure for b in plain["logits"].bounds] == ["relative_l2", "worst_l2", "top1_gap"]
    wrong = rows({"logits": np.array([[p, p]]), "choice": np.array([[0]])}, expectation, held_to)
    assert wrong["choice"].problem == "shape (1, 1) where the reference has (1, 2)"
    unlimited = rows({"logits": np.array([[p, p]]), "choice": np.array([[0, 0]])}, expectation, limits())
    assert "have no top1_gap_max" in unlimited["choice"].problem


@pytest.mark.parametrize("without", ["", "answer", "reference", "lead"])
def test_labels_need_the_scores_that_decide_them(without: str) -> None:
    scores, labels = np.array([[[0.0, 1.0]]]), np.array([[1]])
    outputs = {"labels": labels, "scores": scores}
    expectation = Expectation(
        case=case("one"), outputs={"labels": labels} if without == "reference" else outputs,
        leads={} if without == "lead" else {"labels": np.array([[1.0]])},
    )  # fmt: skip
    answers = {"labels": labels} if without == "answer" else outputs
    row = rows(answers, expectation, limits(), {"labels": ("labels", "scores")})["labels"]
    assert row.problem == ("labels cannot be compared without the scores 'scores'" if without else "")
    assert row.passed == (not without)


def test_a_refusal_is_one_of_one() -> None:
    asked = case("odd", expect_refusal=True)
    report = judge.judge(lambda _: {}, (), (asked,), limits(), candidate_name="c", reference_name="r")
    (row,) = report.rows
    assert [(b.figure, b.value, b.limit, b.reason, b.holds) for b in row.bounds] == [
        ("refused", 0.0, 1.0, "a test", False)
    ]


# Who is trusted


@pytest.mark.parametrize(
    ("given", "trusted"),
    [({}, False), ({"trust_plan": True}, True), ({"signed": "a manifest"}, True),
     ({"signed": "a manifest", "trust_plan": True}, True)],
)  # fmt: skip
def test_a_plan_that_holds_code_needs_a_signature_or_trust(
    given: Any, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    found = validate_bundle.Validated(manifest="before", report=judge.Report(candidate="c", reference="r", rows=()))  # type: ignore[arg-type]

    def judged(_folder: Any, _manifest: Any, images: Any, weights: Any, runtime: Any, trusted: bool, *_: Any) -> Any:
        asked.append((images, weights, runtime, trusted))
        return found

    monkeypatch.setattr(validate_bundle, "_judged", judged)
    monkeypatch.setattr(validate_bundle.bundle, "checked", lambda *_, **__: nullcontext("before"))
    assert validate_bundle.validate(Path("bundle"), **given) == found and not found.recorded
    assert asked == [(None, (None, None), None, trusted)]


@pytest.mark.parametrize(
    ("record", "reason", "recorded", "told"),
    [(True, "", True, ""), (True, "it is signed", False, "it is signed"),
     (False, "", False, "Not recorded: the bundle is in an object store.")],
)  # fmt: skip
def test_what_engines_showed_is_recorded_where_it_can_be(
    record: bool, reason: str, recorded: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = validate_bundle.Validated(manifest="after", report=judge.Report(candidate="c", reference="r", rows=()))  # type: ignore[arg-type]
    written: list[Any] = []
    monkeypatch.setattr(validate_bundle, "_judged", lambda *_: after)
    monkeypatch.setattr(validate_bundle.bundle, "checked", lambda *_, **__: nullcontext("before"))
    monkeypatch.setattr(validate_bundle, "_record", lambda *manifests: written.append(manifests) or reason)
    found = validate_bundle.validate(Path("bundle"), **({} if record else {"record": False}))
    assert (found.recorded, found.not_recorded) == (recorded, told)
    assert written == ([(Path("bundle"), "before", "after")] if record else [])


def test_pytorch_answers_every_case_or_none() -> None:
    """An answer that is missing may not shift the others to other cases."""

    class Short(Oracle):
        def reference(self, read: Any, inputs: Any, *, precision: Precision, progress: Any) -> Any:
            return super().reference(read, inputs, precision=precision, progress=progress)[:-1]

    with pytest.raises(ValueError, match="zip"):
        computed(Short(EXACT, LOSSY), limits(), case("one"), case("three"))


def test_values_that_overflow_are_looked_for_where_an_answer_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        evaluate.error_analysis, "range_rows",
        lambda model, graphs, cases, *, progress: asked.append((model, graphs, cases)) or ("an added row",),
    )  # fmt: skip
    cases = (case("one"), case("wrong size", expect_refusal=True), case("three"))
    before: Any = judge.Report(candidate="ours", reference="theirs", rows=("a row",))
    graphs: Any = {"model.onnx": "graph"}
    model: Any = "model"
    found: Any = evaluate.with_ranges(before, model, graphs, cases)
    assert asked == [("model", graphs, [cases[0], cases[2]])] and found.rows == ("a row", "an added row")
