"""A live endpoint against a bundle's reference: what is sent, what is timed, and whose reference it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle.reference_file import Reference
from dinoexport.config.limits import Limit, Limits
from dinoexport.errors import InputRefused, UsageError
from dinoexport.serving import check, text_check
from dinoexport.serving.text_client import Ended, TextAnswer
from dinoexport.spec import Case, Expectation
from dinoexport.text import prompts, tokenizer
from tests.serving.endpoints import SERVED

CHOSEN = "chosen for this test alone"


def limits(**more: Any) -> Limits:
    least = dict.fromkeys(("cosine_mean_min", "cosine_p01_min"), Limit(value=0.9, reason=CHOSEN))
    most = dict.fromkeys(("relative_l2_max", "worst_l2_max"), Limit(value=0.1, reason=CHOSEN))
    return Limits.model_validate(least | most | more)


def case(name: str, size: int, **more: Any) -> Case:
    return Case(name=name, why="chosen", inputs={"x": np.ones((1, size), np.float32)}, **more)


def expected(case: Case) -> Expectation:
    return Expectation(case=case, outputs={"y": 2 * case.inputs["x"]})


REFERENCE = Reference(
    name="PyTorch",
    limits=limits(),
    expectations=(expected(case("wide", 9)), expected(case("small", 2)), expected(case("middle", 4))),
    refusals=(case("empty", 0, expect_refusal=True),),
)


def drive(_clients: Any, inputs: Any) -> Any:
    if not inputs["x"].size:
        raise InputRefused("empty")
    return {"y": 2 * inputs["x"]}


class Server:
    """What is asked of it; `role` is what the family knows of text, and `reference` is what a bundle has."""

    def __init__(self) -> None:
        self.served: Any = SERVED
        self.serves_text, self.role, self.reference = False, None, REFERENCE
        self.asked: list[Any] = []
        self.read: list[Path] = []

    def text_served(self, *asked: Any, **how: Any) -> bool:
        self.asked.append((asked, how))
        return self.serves_text

    def open_graphs(self, *asked: Any, **how: Any) -> Any:
        self.asked.append((asked, how))
        return {"model": SimpleNamespace(served=self.served)}

    def read_reference(self, path: Path) -> Reference:
        self.read.append(path)
        return self.reference


def ticks() -> Iterator[float]:
    """A clock whose periods are 1, 2, 3, … quarters of a second between readings."""
    now = 100.0
    for number in range(1, 99):
        yield now
        now += number / 4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made, clock = Server(), ticks()
    model = lambda _recipe: SimpleNamespace(drive=drive, text=made.role)  # noqa: E731
    monkeypatch.setattr(check, "text_served", made.text_served)
    monkeypatch.setattr(check, "open_graphs", made.open_graphs)
    monkeypatch.setattr(check.changes, "reading", lambda *_, **__: nullcontext())
    monkeypatch.setattr(check.reference_file, "read", made.read_reference)
    monkeypatch.setattr(check, "parse", lambda _kind, recipe, **_: recipe)
    monkeypatch.setattr(check.family, "find", lambda _: SimpleNamespace(model=model))
    monkeypatch.setattr(check.untrusted, "is_regular", lambda path: path == Path("bundle/manifest.json"))
    monkeypatch.setattr(bundle, "read_manifest", lambda _: SimpleNamespace(variant="tiny"))
    monkeypatch.setattr(check, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    return made


URL = "http://host:8000"


def test_each_case_is_sent_once_and_timed(server: Server) -> None:
    """Also those that must be refused. The clock is read before and after each."""
    found = check.check(URL, Path("bundle"), model="tiny", headers=Path("h"), ca=Path("c"))
    assert found.latency_ms == {"wide": 250.0, "small": 750.0, "middle": 1250.0, "empty": 1750.0}
    assert list(found.latency_ms) == ["wide", "small", "middle", "empty"]
    assert (found.model, found.report.passed, found.report.candidate) == ("tiny", True, f"tiny 1 at {URL}")
    assert server.read == [Path("bundle/reference.npz")]
    how = {"model": "tiny", "timeout_s": 60.0, "headers": Path("h"), "ca": Path("c")}
    assert server.asked == 2 * [((URL,), how)]


def test_a_probe_sends_the_smallest_case(server: Server) -> None:
    assert check.check(URL, Path("bundle"), quick=True).latency_ms == {"small": 250.0}


def test_a_bundle_of_another_variant_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "read_manifest", lambda _: SimpleNamespace(variant="large"))
    with pytest.raises(UsageError) as refused:
        check.check(URL, Path("bundle"))
    assert refused.value.message == "bundle is a large; the server has a tiny."


def test_the_reference_in_a_repository_is_that_of_the_served_version(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first folder that has one: front ends have none."""
    folders = [tmp_path / name for name in ("tiny_images", "tiny", "tiny_more")]
    asked: list[Any] = []
    monkeypatch.setattr(check, "deployed_as", lambda *place: asked.append(place) or folders)
    with pytest.raises(UsageError) as refused:
        check.check(URL, tmp_path)
    assert refused.value.message == (
        f"{tmp_path} is neither a bundle nor the repository that tiny 1 was deployed to."
    )  # fmt: skip
    for folder in folders:
        for version in ("1", "2"):
            (folder / version).mkdir(parents=True)
    for folder in folders[1:]:
        (folder / "1" / "reference.npz").touch()
    (folders[0] / "2" / "reference.npz").touch()
    check.check(URL, tmp_path)
    assert server.read == [folders[1] / "1" / "reference.npz"] and asked == 2 * [(tmp_path, "tiny")]


# Text

VOCABULARY = 4


def continuation(name: str, *rows: tuple[list[int], list[float]]) -> Expectation:
    """Two tokens after each of the prompts; each row has their ids, and the logits of the first."""
    tokens = np.array([ids for ids, _ in rows], np.int64)
    logits = np.stack([np.stack([np.array(first), np.zeros(VOCABULARY)]) for _, first in rows])
    made = Case(name=name, why="chosen", inputs={"ids": np.zeros((len(rows), 3), np.int64)})
    return Expectation(case=made, outputs={"tokens": tokens, "logits": logits})


def rollout(inputs: Any) -> Any:
    if "ids" not in inputs:
        return None
    prompts_of = tuple((7, place) for place in range(len(inputs["ids"])))
    return SimpleNamespace(prompts=prompts_of, tokens="tokens", logits="logits")


ROLE: Any = SimpleNamespace(rollout=rollout, prompts=SimpleNamespace(completion=lambda text: f"completion of {text!r}"))


class TextServer:
    """Writes these tokens, and ends for this reason; refuses without any."""

    def __init__(self, *ids: int, reason: str = "length") -> None:
        self.served: Any = SERVED.changed(role="text", tokenizer="tokenizer.json")
        self.asked: list[Any] = []
        self._ended = Ended(reason=reason, prompt_tokens=2, completion_tokens=len(ids), token_ids=ids)  # type: ignore[arg-type]

    def answer(self, **values: Any) -> TextAnswer:
        self.asked.append(values)
        if not self._ended.token_ids:
            raise InputRefused("too long")
        return TextAnswer(text="", ended=self._ended)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of the tokenizer, whose token 3 ends an answer."""
    asked: list[Any] = []

    def end_ids(*what: Any) -> frozenset[int]:
        asked.append(what)
        return frozenset({3})

    monkeypatch.setattr(tokenizer, "load", lambda path: asked.append(path) or "the tokenizer")
    monkeypatch.setattr(prompts, "end_ids", end_ids)
    return asked


def text_reference(*expectations: Expectation, **more: Any) -> Reference:
    return Reference(name="PyTorch", limits=limits(**more), expectations=expectations, refusals=())


def test_a_text_model_is_asked_for_each_prompt(words: list[Any]) -> None:
    """What it writes is compared token by token; of a difference PyTorch's own gap decides."""
    client: Any = TextServer(1, 2)
    steps: list[Any] = []
    given = text_reference(
        continuation("two prompts", ([1, 2], [0.0, 0.0, 0.0, 0.0]), ([2, 2], [0.0, 0.0, 0.01, 0.0])),
        continuation("damaged", ([0, 2], [5.0, 1.5, 0.0, 0.0])),
    )
    report = text_check.judged(client, ROLE, given, Path("t.json"), "tiny", progress=lambda *step: steps.append(step))
    assert words == [Path("t.json"), ("the tokenizer", "completion of ''")]
    assert client.asked == [{"prompt_ids": [7, place], "max_tokens": 2} for place in (0, 1, 0)]
    assert steps == [("checking tiny", 1, 2), ("checking tiny", 2, 2)]
    assert (report.candidate, report.reference) == ("tiny", "PyTorch")
    assert [(row.case, row.why, row.output, row.shape) for row in report.rows] == [
        ("two prompts", "chosen", "tokens of prompt 1", (2,)),
        ("two prompts", "chosen", "tokens of prompt 2", (2,)),
        ("damaged", "chosen", "tokens of prompt 1", (2,)),
    ]
    (same,), (rounded,), (damaged,) = (row.bounds for row in report.rows)
    assert [same.value, rounded.value, damaged.value] == [0.0, 0.01, 3.5]
    assert [same.holds, rounded.holds, damaged.holds] == [True, True, False]
    assert {(bound.figure, bound.limit) for bound in (same, rounded, damaged)} == {
        ("gap at the first difference", 0.01)
    }
    assert damaged.reason.startswith("rounding decides between PyTorch's two likeliest tokens")


def test_the_limits_own_gap_is_the_limit(words: list[Any]) -> None:
    given = text_reference(
        continuation("one", ([0, 2], [0.25, 0.0, 0.0, 0.0])), continuation("two", ([0, 2], [0.5, 0.0, 0.0, 0.0])),
        top1_gap_max=Limit(value=0.25, reason=CHOSEN),
    )  # fmt: skip
    client: Any = TextServer(1, 2)
    report = text_check.judged(client, ROLE, given, Path(), "tiny", progress=lambda *_: None)
    bounds = [row.bounds[0] for row in report.rows]
    assert [(b.value, b.limit, b.reason, b.holds) for b in bounds] == [
        (0.25, 0.25, CHOSEN, True), (0.5, 0.25, CHOSEN, False),
    ]  # fmt: skip


def test_a_prompt_that_the_server_refuses_is_a_failure(words: list[Any]) -> None:
    client: Any = TextServer()
    given = text_reference(continuation("one", ([0, 2], [0.0] * 4)), expected(case("no text", 2)))
    (row,) = text_check.judged(client, ROLE, given, Path(), "tiny", progress=lambda *_: None).rows
    assert row.problem == "too long" and not row.passed and np.isnan(row.bounds[0].value)


def test_a_text_model_is_checked_with_the_cases_that_it_continues(
    server: Server, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = TextServer(1, 2)
    server.serves_text, server.role = True, ROLE
    opened: list[Any] = []
    monkeypatch.setattr(check, "TextClient", lambda *url, **how: opened.append((url, how)) or client)
    one, two = (continuation(name, *count * [([1, 2], [0.0] * 4)]) for name, count in (("two", 2), ("one", 1)))
    server.reference = Reference(
        name="PyTorch", limits=limits(), expectations=(expected(case("no text", 1)), one, two),
        refusals=(case("empty", 0),),
    )  # fmt: skip
    found = check.check(URL, Path("bundle"), model="tiny")
    assert opened == [((URL,), {"model": "tiny", "timeout_s": 60.0, "headers": None, "ca": None})]
    assert words[0] == Path("bundle/tokenizer.json")
    assert found.report.passed and found.report.candidate == f"tiny 1 at {URL}" and len(found.report.rows) == 3
    assert found.latency_ms == {"two": 125.0, "one": 125.0}, "a quarter of a second for both"
    assert check.check(URL, Path("bundle"), quick=True).latency_ms == {"one": 750.0}
    server.reference = text_reference(expected(case("no text", 1)))
    with pytest.raises(UsageError) as refused:
        check.check(URL, Path("bundle"))
    assert refused.value.message == (
        "bundle/reference.npz holds no continuation to check a text model with."
    )  # fmt: skip
