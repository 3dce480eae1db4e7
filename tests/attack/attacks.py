"""Small samples of `make attack`: every kind of hostile command line, and kills of what else changes files."""

from __future__ import annotations

import importlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attack
from tests.attack import commands, hostile, kit, scenarios, verb_scenarios
from tests.kills import dies_at

# Loaded once, for the hundreds of processes that are forked from this one; what is only loaded has no threads yet.
for _package in ("dinoexport.cli", "onnxruntime", "onnxscript.optimizer", "torch", "torch.export"):
    importlib.import_module(_package)

# Every kind in turn, this often.
_TURNS = 2


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> hostile.Kit:
    return kit.make(tmp_path_factory.mktemp("kit"))


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_signing_and_recording_are_killed_at_every_operation(
    things: hostile.Kit, tmp_path: Path, by: signal.Signals
) -> None:
    small, public = kit.small_bundle(tmp_path, things.bundle), things.key.with_name("verify.pem")
    stride = 1 if by == signal.SIGKILL else 4
    killed = 0
    for scenario in scenarios.of_signing(small, things.key, public):
        numbers = range(random.randrange(stride), 1000, stride)
        attacked = scenarios.attack(scenario, tmp_path / "attacked", by=by, numbers=numbers)
        assert not attacked.faults
        killed += attacked.kills
    assert killed > (60 if by == signal.SIGKILL else 10)


def test_a_build_is_killed_at_a_few_of_its_operations(things: hostile.Kit, tmp_path: Path) -> None:
    """At all of them in `make attack`."""
    scenario = next(scenarios.of_building(things.recipe))
    numbers = iter(sorted(random.sample(range(40), 2)))
    attacked = scenarios.attack(scenario, tmp_path / "attacked", by=signal.SIGKILL, numbers=numbers)
    assert attacked.kills and not attacked.faults


def test_compile_merge_fit_and_embed_are_killed_at_a_few(things: hostile.Kit, tmp_path: Path) -> None:
    """At many of their operations in `make attack`; here each of the four once or twice, wherever chance has it."""
    compiling = list(verb_scenarios.of_compiling(tmp_path, things.bundle))
    chosen = [
        random.choice([scenario for scenario in compiling if scenario.verb == verb]) for verb in ("compile", "merge")
    ]
    chosen.append(next(verb_scenarios.of_fitting(things.bundle, things.images)))
    chosen.append(random.choice(list(verb_scenarios.of_embedding(things.bundle, things.images))))
    for scenario in chosen:
        numbers = iter([random.randrange(15)] if scenario.apart else sorted(random.sample(range(40), 3)))
        attacked = scenarios.attack(scenario, tmp_path / "attacked", by=signal.SIGKILL, numbers=numbers)
        assert attacked.kills and not attacked.faults, attacked.faults


def test_a_graph_without_a_name_is_no_traceback(things: hostile.Kit, tmp_path: Path) -> None:
    """Its hashes are right; runtimes take it, and what writes ONNX refuses it."""
    import onnx

    copy = tmp_path / "bundle"
    shutil.copytree(things.bundle, copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    model.graph.ClearField("name")
    model.graph.node[0].ClearField("name")
    hostile.relisted(copy, "model.onnx", model.SerializeToString())
    fits = ("fit", "X", "--images", "I", "--out", "out")
    for words in (fits, *random.sample([words for words in hostile.READERS if words[0] != "fit"], 2)):
        ended = commands.run(hostile._filled(words, things, copy), tmp_path)
        assert not ended.faults and (ended.status == 5 or words != fits), f"{words}: {ended.words[-600:]}"


def test_a_path_that_is_too_long_is_one_error(things: hostile.Kit, tmp_path: Path) -> None:
    """At some of the places where a path may stand; `make attack` takes them all."""
    for words in random.sample(hostile.PLACES, 6):
        for strange in ("a name that is too long", "a path that is too long"):
            arguments = hostile._filled(words, things, hostile.STRANGE[strange](tmp_path / "thing"))
            ended = commands.run(arguments, tmp_path)
            assert not ended.faults and ended.status, f"{words[:2]}: {ended.words[-600:]}"


@pytest.fixture(scope="module")
def found(things: hostile.Kit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """Faults by kind, of attempts made by chance; what repeats one is in its line."""
    seed = random.randrange(10**6)
    scratch = tmp_path_factory.mktemp("hostile")
    made: dict[str, list[str]] = {}
    attempts = hostile.attempts(things, scratch, random.Random(seed))
    for attempt, _ in zip(attempts, range(_TURNS * len(hostile.KINDS)), strict=False):
        ended, wrong = attack.hostile_run(attempt, scratch / "here")
        lines = made.setdefault(attempt.kind, [])
        lines += [f"seed {seed}: {fault}: {attempt.arguments!r}: {ended.words[-600:]!r}" for fault in wrong]
    yield made


def test_hostile_command_lines_are_one_error_each(found: dict[str, list[str]]) -> None:
    assert not [line for lines in found.values() for line in lines]
    assert len(found) == len({make.__name__ for make in hostile.KINDS.values()})


def test_every_output_option_is_attacked() -> None:
    """Read from the command line itself: a new verb's output is under the tests below, or this fails."""
    from typer.main import get_command

    from dinoexport.cli.app import app

    command: Any = get_command(app)
    options = {
        (verb, name)
        for verb, each in command.commands.items()
        for parameter in each.params
        for name in parameter.opts
        if name in hostile.OUTPUT_OPTIONS or _writes(parameter)
    }
    assert options == set(hostile.OUTPUTS)


def _writes(parameter: Any) -> bool:
    """Whether an option's own words are that it writes a file or a folder."""
    path = any(word in (parameter.metavar or "") for word in ("DIR", "FILE", "PATH"))
    return path and "write" in (getattr(parameter, "help", None) or "").lower().split()


_THINGS = ("file", "folder", "pipe", "device", "link", "link to nothing", "work", "work link", "below a file")


@pytest.mark.parametrize("place", hostile.OUTPUTS, ids=" ".join)
def test_an_output_over_what_is_somebodys_is_refused(
    things: hostile.Kit, tmp_path: Path, place: tuple[str, str]
) -> None:
    rng = random.Random()
    # Every thing is tried by `make attack`. A pipe and a device always: what opens them hangs or destroys them.
    for kind in ("pipe", "device", *rng.sample(_THINGS, 2)):
        here = tmp_path / str(rng.random())
        here.mkdir()
        attempt = hostile.output_over(place, kind, things, here, rng)
        ended, wrong = attack.hostile_run(attempt, here)
        assert not wrong, f"{kind}: {attempt.arguments}: {ended.words[-600:]}"


def test_the_attack_notices_faults(things: hostile.Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of fault is seen when it is there."""
    from dinoexport import cli

    def ending(work: object) -> commands.Ended:
        monkeypatch.setattr(cli, "main", work)
        return commands.run(("list",), tmp_path, limit_s=1.0, limit_bytes=1 << 27)

    def fails() -> None:
        raise ValueError("bug")

    def grows() -> None:
        held = bytearray(1 << 29)
        held[:: 1 << 12] = bytes(1 << 17)
        while held:
            pass

    def says() -> None:
        print("\x1b[2J")

    def hangs() -> None:
        while True:
            pass

    def nothing() -> None:
        sys.exit(2)

    assert ending(fails).faults == ["traceback"]
    assert ending(grows).faults == ["memory"]
    assert ending(says).faults == ["steers the terminal"]
    assert ending(hangs).faults == ["hangs"]
    assert ending(nothing).faults == ["no error said"]
    victim = hostile.Attempt(kind="x", arguments=("list",), refused=True, victim=tmp_path / "victim")
    (tmp_path / "victim").write_text("mine")
    monkeypatch.setattr(cli, "main", (tmp_path / "victim").unlink)
    assert attack.hostile_run(victim, tmp_path)[1] == ["accepted", "touches what is not ours"]


def test_the_kills_notice_what_is_half_done(tmp_path: Path) -> None:
    """A verb that writes two files, one after the other."""

    def begin(place: Path) -> None:
        place.mkdir()
        for name in "ab":
            (place / name).write_text("old")

    def work(place: Path) -> None:
        for name in "ab":
            (place / name).write_text("new")

    def state(place: Path) -> list[str]:
        return [path.read_text() for path in sorted(place.iterdir())]

    naive = scenarios.Scenario(verb="naive", begin=begin, work=work, state=state)
    attacked = scenarios.attack(naive, tmp_path / "attacked", by=signal.SIGKILL, numbers=range(9))
    assert attacked.kills == 2 and [attack._column(fault) for fault in attacked.faults] == ["half done"]
    assert dies_at(0, lambda: (tmp_path / "file").write_text("x")) == -signal.SIGKILL


def test_make_attack_prints_its_table(tmp_path: Path) -> None:
    """The driver, as `make attack` calls it, with two inputs."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.attack",
        "--kills",
        "0",
        "--inputs",
        "2",
        "--seed",
        "7",
        "--scratch",
        str(tmp_path / "s"),
    ]
    for inputs in ("2", "3"):  # the second goes on where the first ended
        command[command.index("--inputs") + 1] = inputs
        ran = subprocess.run(
            [*command, "--out", str(tmp_path / "t.md")],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert f"{inputs} hostile inputs, seed 7" in (tmp_path / "t.md").read_text()
    assert "| files that are none | 1 |" in (tmp_path / "t.md").read_text()
