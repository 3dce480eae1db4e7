"""What is killed: each verb that changes files, from a state it begins in, with the states it may be left in.

A scenario is killed, or interrupted, before the n-th of its file operations; then whoever comes next finishes or takes
back what was begun, and the same verb again gives what an undisturbed run gives.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinoexport import bundle
from dinoexport.bundle import signing
from dinoexport.cli import contents
from dinoexport.errors import DinoexportError
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.workspace import Stage, key_of, workspace
from dinoexport.serving.triton import model_repository
from dinoexport.spec import Precision, silent
from dinoexport.system import changes
from tests.kills import ENDED, INTERRUPTED, dies_at

_NEVER = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One verb from one state. begin: makes the state at a path; work: the verb; state: what is compared of the place.

    name: of the folder that changes, which a signature names. apart: whether it only ever runs in a forked process, for
    threads that it starts would not survive a fork. others: other verbs at the place; each finishes what was begun, or
    refuses it, and leaves it as it was or as it was to be.
    """

    verb: str
    begin: Callable[[Path], object]
    work: Callable[[Path], object]
    state: Callable[[Path], Any]
    name: str = "place"
    apart: bool = False
    others: tuple[Callable[[Path], object], ...] = ()

    def do(self, work: Callable[[Path], object], place: Path) -> None:
        """Runs `work` undisturbed."""
        if not self.apart:
            work(place)
        elif dies_at(_NEVER, lambda: work(place)) != ENDED:
            raise DinoexportError(f"{self.verb} failed", next_step="Look at what it said.")


@dataclass(kw_only=True)
class Attacked:
    """What was found. kills: how many processes died or were interrupted; faults: what should not be, a line each."""

    kills: int = 0
    done_before: int = 0
    faults: list[str] = field(default_factory=list)


def attack(scenario: Scenario, scratch: Path, *, by: signal.Signals, numbers: Iterator[int] | range) -> Attacked:
    """Kills the scenario before each of the operations `numbers`, until there is none left."""
    found = Attacked()
    start, calm = scratch / "start" / scenario.name, scratch / "calm" / scenario.name
    for folder in (start, calm):
        folder.parent.mkdir(parents=True)
        scenario.do(scenario.begin, folder)
    scenario.do(scenario.work, calm)
    before, after = scenario.state(start), scenario.state(calm)
    for number in numbers:
        place = scratch / "killed" / scenario.name
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        if start.exists():
            shutil.copytree(start, place, symlinks=True)
        status = dies_at(number, lambda place=place: scenario.work(place), by=by)  # type: ignore[misc]
        if status == ENDED:
            break
        found.kills += 1
        other = scenario.others[number % len(scenario.others)] if scenario.others else None
        fault = _fault(scenario, place, status, by, before, after, found, other)
        if fault:
            found.faults.append(f"{scenario.verb}, {by.name} at operation {number}: {fault}")
    shutil.rmtree(scratch)
    return found


def _fault(
    scenario: Scenario,
    place: Path,
    status: int,
    by: signal.Signals,
    before: Any,
    after: Any,
    found: Attacked,
    other: Callable[[Path], object] | None,
) -> str:
    if status not in (-by, INTERRUPTED):
        return f"it ended with {status}"
    interrupted = status == INTERRUPTED
    if interrupted and (place.parent / f".{place.name}.work" / "change.json").exists():
        return "an interrupt left a change half done"
    try:
        try:
            (other or changes.settle)(place)
        except DinoexportError:
            if other is None:
                raise
            changes.settle(place)  # it refused, and so it need not have finished anything
        now = scenario.state(place)
        if now not in (before, after):
            return "it is neither as it was nor as it was to be"
        if now == after:
            found.done_before += 1
        if now == before or before == after:
            scenario.do(scenario.work, place)
        if scenario.state(place) != after:
            return "done again it is another state"
    except DinoexportError as error:
        return f"the next one fails: {error.message}"
    left = sorted(path.name for path in place.parent.iterdir() if path != place)
    return f"left behind: {left}" if left and now == before else ""  # one that was done already leaves it to the next


def _read(place: Path) -> None:
    with changes.reading(place):
        pass


def _checked(place: Path) -> None:
    with bundle.checked(place):
        pass


READERS = (contents.of_path, contents.page_of, _checked, _read)


def of_deploying(built: Path) -> Iterator[Scenario]:
    """Deploy and rollback, from several histories. A release's time is not compared."""

    def deployed(*kinds: str) -> Callable[[Path], None]:
        def begin(place: Path) -> None:
            place.mkdir()
            for kind in kinds:
                steps[kind](place)

        return begin

    steps: dict[str, Callable[[Path], object]] = {
        "onnxruntime": lambda models: model_repository.deploy(built, models, name="tiny"),
        "python": lambda models: model_repository.deploy(built, models, name="tiny", backend="python"),
        "another name": lambda models: model_repository.deploy(built, models, name="other"),
        "rollback": lambda models: model_repository.rollback(models, "tiny"),
    }
    histories = [
        ((), "onnxruntime"), (("onnxruntime",), "python"), (("onnxruntime", "python"), "rollback"),
        (("python", "python", "python"), "rollback"), (("another name",), "python"),
        (("python", "onnxruntime", "rollback"), "onnxruntime"), (("python", "python", "rollback"), "python"),
        (("onnxruntime", "another name", "onnxruntime"), "rollback"),
    ]  # fmt: skip
    # Neither changes anything but what was begun: there is no such name, and no such file.
    others = (
        lambda models: model_repository.rollback(models, "nobody"),
        lambda models: model_repository.deploy(built, models, name="tiny", samples=models / "no such folder"),
        _read,
    )
    for history, verb in histories:
        name = "rollback" if verb == "rollback" else "deploy"
        yield Scenario(verb=name, begin=deployed(*history), work=steps[verb], state=of_repository, others=others)


def of_repository(place: Path) -> dict[str, Any]:
    """Every file of a repository, and of its records the versions that were served."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        if path.is_file():
            name = path.relative_to(place).as_posix()
            record = name.endswith(".releases.json")
            found[name] = json.loads(path.read_bytes())["served"] if record else path.read_bytes()
    return found


def of_signing(small: Path, key: Path, public: Path) -> Iterator[Scenario]:
    """Signing a bundle that is not signed and one that is; recording a verdict without a signature and with one."""
    signer = signing.open_signer(key, ask=lambda: "")

    def copied(place: Path) -> None:
        shutil.copytree(small, place)

    def signed(place: Path) -> None:
        copied(place)
        signer.sign(place)

    def sign(place: Path) -> None:
        signer.sign(place)

    def record(place: Path) -> None:
        _record(place, None)

    def record_and_sign(place: Path) -> None:
        _record(place, signer)

    def _record(place: Path, own: signing.Signer | None) -> None:
        before = bundle.read_manifest(place)
        after = before.changed(target="recorded")
        bundle.rewrite(place, before=before, after=after, sign=None if own is None else own.signature)

    def state(place: Path) -> Any:
        names = sorted(path.name for path in place.iterdir())
        if bundle.SIGNATURE in names:
            signing.verify(place, public)
        return names, bundle.read_manifest(place).target

    for begin, work in ((copied, sign), (signed, sign), (copied, record), (signed, record), (signed, record_and_sign)):
        verb = "sign" if work is sign else "record"
        yield Scenario(verb=verb, begin=begin, work=work, state=state, name="bundle", others=READERS)


def of_publishing() -> Iterator[Scenario]:
    """The end of a build alone, with stages that cost nothing: a bundle appears, or takes the place of another."""

    def published(content: bytes) -> Callable[[Path], None]:
        def work(place: Path) -> None:
            stages = {}
            with workspace(place, force=False, progress=silent) as work:
                for name, file, data in (("export", "model.onnx", b"graph"), ("page", "report.html", content)):
                    key = key_of(name=name, data=data.hex())
                    stages[name] = work.stage(name, key, lambda folder, f=file, d=data: _write(folder / f, d))
                work.publish(stages, _manifest(stages))

        return work

    def state(place: Path) -> Any:
        if not place.exists():
            return "nothing"
        bundle.verify(place)
        return {path.name: path.read_bytes() for path in place.iterdir()}

    for begin in (lambda _: None, published(b"old")):
        yield Scenario(
            verb="build, its end", begin=begin, work=published(b"new"), state=state, name="bundle", others=READERS
        )


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _manifest(stages: dict[str, Stage]) -> bundle.Manifest:
    return bundle.Manifest(
        variant="vits14", family="dinov2", precision=Precision.FP32, target="cpu", verdict="unjudged", recipe={},
        checkpoint=bundle.CheckpointFacts(source="synthetic:0", sha256=key_of(), licence="none"), graphs=(),
        files=tuple(file for stage in stages.values() for file in stage.files),
        stage_keys={name: stage.key for name, stage in stages.items()},
        versions={}, card={}, report={}, created=datetime(2025, 1, 1, tzinfo=UTC),
    )  # fmt: skip


def of_building(recipe: Path) -> Iterator[Scenario]:
    """A whole build, where nothing was and over another bundle. What the clock writes is not compared."""

    def build(seed: int) -> Callable[[Path], None]:
        def work(place: Path) -> None:
            request = pipeline.build_request(str(recipe), weights=f"synthetic:{seed}", out=place, target="cpu")
            pipeline.build(request)

        return work

    def state(place: Path) -> Any:
        if not place.exists():
            return "nothing"
        manifest = bundle.verify(place)
        return sorted(path.name for path in place.iterdir()), manifest.checkpoint.source, manifest.verdict

    for begin in (lambda _: None, build(1)):
        yield Scenario(verb="build", begin=begin, work=build(0), state=state, name="bundle", apart=True)
