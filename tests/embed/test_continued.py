"""A run goes on where it stopped: extended, killed, without room on its disk, with workers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dinoexport.embed import local, run
from dinoexport.embed import plan as plans
from dinoexport.errors import BuildError, UsageError
from tests.embed.conftest import BROKEN, COUNT, fill, picture
from tests.embed.runs import LENIENT, command, expected, hashes, in_workers, rows_of

ROOT = Path(__file__).parent.parent.parent


def test_goes_on_and_refuses_another_run(tiny: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run.embed(tiny, str(photos), str(out), shards=4, part=(1, 2), **LENIENT)
    assert (found.shards, found.complete) == (2, False) and not (out / plans.SUCCESS).exists()
    first = hashes(out)
    assert len(first) == 2
    found = run.embed(tiny, str(photos), str(out), **LENIENT)
    assert (found.shards, found.done_before, found.complete) == (4, 2, True)
    assert first.items() <= hashes(out).items()
    for change, said in (({"dtype": "float16"}, "dtype 'float32', not 'float16'"), ({"shards": 5}, "4 shards, not 5")):
        with pytest.raises(UsageError, match=said):
            run.embed(tiny, str(photos), str(out), **{**LENIENT, **change})
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "one.jpg").write_bytes(picture(1))
    with pytest.raises(UsageError, match="holds another run: it has images"):
        run.embed(tiny, str(tmp_path / "others"), str(out), **LENIENT)
    (tmp_path / "moved").symlink_to(photos)
    assert run.embed(tiny, str(tmp_path / "moved"), str(out), **LENIENT).complete  # the same listing elsewhere


def test_extend_and_retry(tiny: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    fill(photos, 20)
    run.embed(tiny, str(photos), str(out), shards=3, **LENIENT)
    before = hashes(out)
    fill(photos, 15, first=20)
    found = run.embed(tiny, str(photos), str(out), extend=True, **LENIENT)
    assert (found.rows, found.complete) == (35, True)
    assert before.items() <= hashes(out).items() and any(n.startswith("extension-1-") for n in hashes(out))
    assert sorted(r["path"] for r in rows_of(out)) == sorted(
        p.relative_to(photos).as_posix() for p in photos.rglob("*.jpg")
    )
    assert run.embed(tiny, str(photos), str(out), extend=True, **LENIENT).done_before == found.shards  # nothing new
    failed = [row["path"] for row in rows_of(out) if row["error"]]
    for name in failed[:2]:
        (photos / name).write_bytes(picture(hash(name) % 1000))
    untouched = {r["path"]: r["class_token"] for r in rows_of(out)}
    seen: list[run.State] = []
    found = run.embed(tiny, str(photos), str(out), retry_failed=True, watch=seen.append, **LENIENT)
    assert found.failed == len(failed) - 2 and {state.rows_total for state in seen} == {len(failed)}
    after = {r["path"]: r for r in rows_of(out)}
    assert len(after) == 35 and all(after[name]["error"] is None for name in failed[:2])
    assert all(after[name]["class_token"] == tokens for name, tokens in untouched.items() if name not in failed)
    right = expected(tiny, photos, failed[:2])
    for name in failed[:2]:
        np.testing.assert_allclose(after[name]["class_token"], right[name]["class_token"][0], rtol=2e-5, atol=2e-5)
    success = json.loads((out / plans.SUCCESS).read_text())
    assert {n: f["sha256"] for n, f in success["parts"].items()} == hashes(out) and success["failed"] == found.failed


def test_killed_at_random_nothing_is_lost_or_doubled(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Two runners on one folder, killed at any moment; in the end every image has its one row, and nothing is left."""
    words = ["-m", "tests.embed.kill_workers", str(tiny), str(photos), str(tmp_path / "out"), "20", "5"]
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = json.loads(ran.stdout)
    assert said["kills"] >= 20 and (said["rows"], said["distinct"], said["left"]) == (COUNT, COUNT, [])


def test_a_killed_command_leaves_no_worker_and_is_taken_up(tiny: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(tiny, photos, out, "--shards", "6", "--workers", "1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not list(out.glob("*.parquet")):
        time.sleep(0.02)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _group_lives(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = hashes(out)
    found = run.embed(tiny, str(photos), str(out), **LENIENT)
    assert found.complete and found.done_before == len(before) and before.items() <= hashes(out).items()
    assert not [p for p in out.rglob("*") if p.name.endswith(".partial")]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_image_that_kills_the_decoder_is_one_failed_row(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies is replaced; the image it dies of is found, and is a row like any other failure."""
    in_workers(
        monkeypatch,
        tmp_path,
        "import os, signal, hashlib\n"
        "import dinoexport.embed.embedder as e\n"
        "real = e.Prepared.of\n"
        "def of(self, name, read):\n"
        "    if name == 'd1/022.jpg': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return real(self, name, read)\n"
        "e.Prepared.of = of\n",
    )
    seen: list[run.State] = []
    found = run.embed(tiny, str(photos), str(tmp_path / "out"), shards=3, watch=seen.append, **LENIENT)
    assert (found.rows, found.failed) == (COUNT, BROKEN + 1)
    (row,) = [row for row in rows_of(tmp_path / "out") if row["path"] == "d1/022.jpg"]
    assert row["error"] == "the decoder died of SIGSEGV on it"
    assert not list((tmp_path / "out").rglob(".*.partial"))  # of the worker that died
    assert (seen[-1].rows, seen[-1].failed) == (COUNT, BROKEN + 1)  # what died was not counted twice


@pytest.mark.parametrize("times", [2, 9])
def test_a_worker_that_is_killed_while_it_opens_the_bundle_is_replaced(
    times: int, tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shard's killer is: some times, not for ever."""
    in_workers(
        monkeypatch,
        tmp_path,
        "import os, pathlib, signal\n"
        f"starts = pathlib.Path({str(tmp_path / 'starts')!r})\n"
        "with starts.open('a') as file: file.write('x')\n"
        f"if starts.stat().st_size <= {times}: os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    if times < local.DEATHS_MAX:
        assert run.embed(tiny, str(photos), str(tmp_path / "out"), shards=2, **LENIENT).complete
        return
    with pytest.raises(BuildError, match="died of SIGKILL before its first shard") as raised:
        run.embed(tiny, str(photos), str(tmp_path / "out"), shards=2, **LENIENT)
    assert "--workers" in raised.value.next_step


def test_finished_run_of_1000_shards_restarts_at_once(tiny: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.embed(tiny, str(photos), str(out), shards=1000, **LENIENT)
    started = time.monotonic()
    found = run.embed(tiny, str(photos), str(out), **LENIENT)
    assert time.monotonic() - started < 5
    assert (found.shards, found.done_before, found.rows) == (1000, 1000, COUNT)


def test_full_disk_keeps_what_is_finished(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """A limit on a file's size stands for the disk: a big shard fails in one sentence, and no part is left of it."""
    import resource

    def little() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    words = command(tiny, photos, tmp_path / "out", "--shards", "2", "--outputs", "patch_tokens", "--workers", "1")
    ended = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=little)
    assert ended.returncode == 4 and "No room left" in ended.stderr, ended.stderr
    assert not list((tmp_path / "out").glob("*.parquet")) and not list((tmp_path / "out").glob(".*"))
