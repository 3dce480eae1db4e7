"""The command line interrupted before any of its file operations: its last words say what is true of the place."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dinoexport import __main__
from dinoexport.bundle import MANIFEST, SIGNATURE
from dinoexport.serving.triton import batching, model_repository, served_models
from dinoexport.system import changes
from tests.attack import hostile, kit, scenarios
from tests.kills import ENDED, INTERRUPTED, dies_at

NOTHING = "Interrupted. Nothing was changed; finished stages of a build are kept and reused."
# Every operation is interrupted in `make attack`; here some, from a chance one.
STRIDE = 6


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> hostile.Kit:
    return kit.make(tmp_path_factory.mktemp("kit"))


def interrupted(arguments: Sequence[object], number: int, by: signal.Signals, said: Path) -> tuple[int, str]:
    """(how it ended, its words) of a command line that gets the signal before its `number`-th operation."""

    def work() -> None:
        descriptor = os.open(said, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for target in (1, 2):
            os.dup2(descriptor, target)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        sys.argv = ["dinoexport", *map(str, arguments)]
        try:
            __main__.main()
        except SystemExit as ended:
            if ended.code == INTERRUPTED:
                raise KeyboardInterrupt from None
            if ended.code:
                raise

    status = dies_at(number + 3, work, by=by)  # the file of its words is opened first, and twice to write
    return status, said.read_text()


def state(place: Path) -> Any:
    """What a repository serves; of a bundle whether it is signed, and by which manifest."""
    if (place / MANIFEST).exists():
        return (place / SIGNATURE).exists(), (place / MANIFEST).read_bytes()
    return scenarios.of_repository(place) if place.exists() else {}


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["deploy", "deploy again", "rollback", "sign"])
def test_last_words_are_true(
    things: hostile.Kit, tmp_path: Path, verb: str, by: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_models, "_measured", lambda *_: batching.unmeasured((), "", 4))
    start, place = tmp_path / "start", tmp_path / "place"
    start.mkdir()
    for _ in range({"deploy again": 1, "rollback": 2}.get(verb, 0)):
        model_repository.deploy(things.bundle, start, name="tiny")
    if verb == "sign":
        shutil.rmtree(start)
        shutil.copytree(things.bundle, start)
    arguments = {
        "deploy": ("deploy", things.bundle, "--to", place, "--name", "tiny"),
        "rollback": ("rollback", place, "tiny"),
        "sign": ("validate", place, "--sign", things.key),
    }[verb.split(maxsplit=1)[0]]
    monkeypatch.setattr(changes, "_done", [])  # what this process did is not what the forked one did
    before = state(start)
    told: set[bool] = set()
    for number in range(random.randrange(STRIDE), 1000, STRIDE):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)
        status, words = interrupted(arguments, number, by, tmp_path / "said")
        if status == ENDED:
            break
        assert status == INTERRUPTED, f"operation {number} ended with {status}: {words}"
        last = words.strip().splitlines()[-1]
        changed = state(place) != before
        assert last == NOTHING or last.startswith("Interrupted. It came after this was done: "), words
        assert changed == (last != NOTHING), f"operation {number}: {last}"
        told.add(changed)
    assert False in told and "Traceback" not in words


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_said_twice(things: hostile.Kit, tmp_path: Path, number: signal.Signals) -> None:
    """A second signal while the first one's end is under way changes nothing."""
    status, words = interrupted(("inspect", things.bundle), 0, number, tmp_path / "said")
    assert status in (ENDED, INTERRUPTED) and words.count("Interrupted") <= 1
