"""Load on a text model in a real Triton server, at 1 to 16 streams: `make soak-text`.

A bundle is deployed and asked for text by streaming clients, some of which leave in the middle. Beside each level the
same prompts are written in this process by the same batches, so that what the server costs is a ratio of neighbours in
time. Once the model's process is killed while it writes: every client must be told, and a load must heal it. Any wrong
answer, and any client that waits for ever, ends the run. Writes benchmarks/results/soak_text.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.soak import memory_mb
from dinoexport.errors import DinoexportError
from dinoexport.runtime import text_model
from dinoexport.serving.text_client import Ended, TextClient
from dinoexport.serving.triton import model_repository
from dinoexport.text import generation, requests
from dinoexport.text.requests import OpenTextModel
from tests.triton_server import Server, missing

RESULTS = Path(__file__).parent / "results"
LEVELS = (1, 2, 4, 8, 16)
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time there was", "1, 2, 3, 4,")
LEAVES_EVERY = 10  # so many answers of a client, and in the middle of the next it leaves
HEADER = (
    "streams", "answers", "left in the middle", "tokens/s", "in process, tokens/s", "server / process",
    "first words ms", "server MB before", "after",
)  # fmt: skip


def main() -> None:
    """Runs every level, then the kill; writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="A bundle that writes text.")
    parser.add_argument("--seconds", type=float, default=600, help="For all levels together.")
    parser.add_argument("--tokens", type=int, default=32, help="The most tokens of an answer.")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak_text.md")
    asked = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    model = text_model.open_bundle(asked.bundle)
    wanted = {prompt: written(model, prompt, asked.tokens) for prompt in PROMPTS}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model_repository.deploy(asked.bundle, scratch / "models", name="text")
        server = Server(scratch / "models", scratch, "--model-control-mode=explicit", "--load-model=*")
        try:
            each_s = asked.seconds / len(LEVELS) / 2
            rows = []
            for streams in LEVELS:
                rows.append(level(server, model, streams, each_s, asked.tokens, wanted))
                print(dict(zip(HEADER, rows[-1], strict=True)), flush=True)
            healed_s = killed(server, wanted, asked.tokens)
            cancelled = re.search(r'reason="cancelled".*\} (\d+)', server.metrics())
        finally:
            server.kill(gently=True)
    lines = [
        f"{asked.bundle.name} on Triton 2.51, {platform.machine()}, {os.cpu_count()} CPUs, {asked.seconds:.0f} s.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
        f"Answers cancelled by the server because their client had left: {cancelled[1] if cancelled else 0}.",
        f"Model's process killed while it wrote: every client was told; answering again {healed_s:.1f} s later.",
    ]
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def written(model: OpenTextModel, prompt: str, tokens: int) -> tuple[int, ...]:
    """The tokens of an answer, written here."""
    task = model.task(requests.parse({"prompt": prompt, "max_tokens": tokens}))
    *_, last = generation.write(model.tokenizer, model.decoder, task)
    assert isinstance(last, generation.Written)
    return last.ids


def level(
    server: Server, model: OpenTextModel, streams: int, seconds: float, tokens: int, wanted: dict[str, tuple[int, ...]]
) -> tuple[object, ...]:
    """The figures of one number of streams: the server's, then this process's."""
    before_mb = memory_mb(server)
    counts, first_ms = {"answers": 0, "left": 0, "tokens": 0}, []
    lock, deadline = threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        mine = TextClient(server.http, model="text")
        for turn in itertools.count(1):
            if time.monotonic() > deadline:
                return
            prompt, started, ids = PROMPTS[(number + turn) % len(PROMPTS)], time.monotonic(), None
            events = mine.stream(prompt=prompt, max_tokens=tokens)
            leaves = turn % LEAVES_EVERY == 0
            for item in events:
                if ids is None:
                    with lock:
                        first_ms.append(1000 * (time.monotonic() - started))
                    ids = ()
                if leaves:
                    events.close()
                    break
                if isinstance(item, Ended):
                    ids = item.token_ids
            with lock:
                counts["left" if leaves else "answers"] += 1
                counts["tokens"] += len(ids or ())
            if not leaves and ids != wanted[prompt]:
                raise AssertionError(f"{prompt!r} came out otherwise: {ids}")

    started = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(client, range(streams)))
    server_per_s = counts["tokens"] / (time.monotonic() - started)
    process_per_s = alone(model, streams, seconds, tokens)
    middle = sorted(first_ms)[len(first_ms) // 2]
    return (
        streams, counts["answers"], counts["left"], f"{server_per_s:.1f}", f"{process_per_s:.1f}",
        f"{server_per_s / process_per_s:.2f}", f"{middle:.0f}", f"{before_mb:.0f}", f"{memory_mb(server):.0f}",
    )  # fmt: skip


def alone(model: OpenTextModel, streams: int, seconds: float, tokens: int) -> float:
    """Tokens a second of the same batches without a server."""
    batch = generation.Batch(model.decoder)
    count, turn, started = 0, 0, time.monotonic()
    while time.monotonic() - started < seconds:
        while len(batch) < min(batch.slots, streams):
            turn += 1
            values = {"prompt": PROMPTS[turn % len(PROMPTS)], "max_tokens": tokens}
            batch.add(generation.Answer(model.tokenizer, model.task(requests.parse(values))))
        count += len(batch.iterate())
    return count / (time.monotonic() - started)


def killed(server: Server, wanted: dict[str, tuple[int, ...]], tokens: int) -> float:
    """Kills the model's process under four clients; seconds until a load has healed it."""
    told: list[str] = []

    def client(number: int) -> None:
        try:
            for _ in range(1000):
                TextClient(server.http, model="text", timeout_s=10).answer(prompt=PROMPTS[number], max_tokens=tokens)
        except DinoexportError as error:
            told.append(error.message)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    for stub in server.stubs("text"):
        os.kill(stub, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    if len(told) != len(threads):
        sys.exit(f"{len(threads) - len(told)} clients of a killed process still wait.")
    started = time.monotonic()
    server.unload("text")
    server.load("text")
    answer = TextClient(server.http, model="text").answer(prompt=PROMPTS[0], max_tokens=tokens)
    assert answer.ended.token_ids == wanted[PROMPTS[0]]
    return time.monotonic() - started


if __name__ == "__main__":
    main()
