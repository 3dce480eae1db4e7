"""Choose batch sizes and queue delay of Triton's batcher from latencies measured on the deploying machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from dinoexport.spec import Arrays, Progress, Runner

_BUDGET_S = 5.0
_ROUNDS = 3
# A larger batch must not form if an item of the best batch takes less than this share of the time of its items, or if
# no batch pays off. Batches below the smallest size are never held back: a server has work between two of them.
# ViT-S at 224 on two cores, 32 requests in flight, images a second: 25.2 in twos, 27.0 in fours, 26.6 in eights,
# 24.3 in sixteens, 27.2 in one process without a server; the server held 405, 421, 423, 574 MB.
_DEAR = 0.9
_LEAST_LARGEST = 4
# A single request waits at most this share of its own latency for others, and only for a batch that saves more.
_DELAY_SHARE = 0.1
QUEUE_TIMEOUT_S = 10.0
_QUEUE_MAX = 1024  # each holds its inputs in memory


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The batcher's settings. latency_ms: batch size -> milliseconds per run; empty if nothing was measured."""

    preferred: tuple[int, ...] = ()
    preferred_why: str = ""
    queue_delay_us: int = 0
    queue_delay_why: str = "what queued up while the last batch ran is merged all the same"
    queue_size: int
    latency_ms: Mapping[int, float] = field(default_factory=dict)


def measure(run: Runner, item: Arrays, max_batch: int, *, progress: Progress) -> dict[int, float]:
    """Milliseconds a run for batches of 1, 2, 4 … `max_batch` of `item` (batch first, of 1).

    The best of three rounds over all sizes, because other load only adds time, and a machine that is slow at first must
    not make the small sizes look slow. No larger sizes once the first round has taken five seconds.
    """
    import numpy as np

    sizes = [*(2**i for i in range(max_batch.bit_length()) if 2**i < max_batch), max_batch]
    latency_ms: dict[int, float] = {}
    started = time.perf_counter()
    for round_ in range(_ROUNDS):
        for done, size in enumerate(sizes if round_ == 0 else tuple(latency_ms), start=1):
            batch = {name: np.repeat(array, size, axis=0) for name, array in item.items()}
            if round_ == 0:
                run(batch)  # the first run of a shape plans its memory
            begun = time.perf_counter()
            run(batch)
            took_ms = 1000 * (time.perf_counter() - begun)
            latency_ms[size] = min(latency_ms.get(size, took_ms), took_ms)
            progress("measuring batches", round_ * len(sizes) + done, _ROUNDS * len(sizes))
            if round_ == 0 and time.perf_counter() - started > _BUDGET_S:
                break
    return latency_ms


def from_latency(latency_ms: Mapping[int, float], max_batch: int, *, of: str) -> Batching:
    """The batch sizes that pay off, the delay for them, and the queue length that is answered before requests time out.

    latency_ms: batch size -> milliseconds a run; `of` names the shape it was measured with.
    """
    item_ms = {size: total_ms / size for size, total_ms in sorted(latency_ms.items())}
    best_ms = min(item_ms.values())
    # Where larger batches only cost more, as on a CPU whose cache they outgrow, none may form. Triton takes a preferred
    # size for an upper bound only while nothing waits: GetDynamicBatch (core, dynamic_batch_scheduler.cc) executes
    # whatever is there once the oldest request has waited for the delay, which under load is always.
    preferred, delay_us, why = _paying(item_ms), 0, "no batch was found worth waiting for"
    harmless = [size for size, ms in item_ms.items() if preferred and _DEAR * ms <= best_ms]
    largest = max(*harmless, *(size for size in item_ms if size <= _LEAST_LARGEST), 1)
    if largest < max(item_ms):
        preferred = (largest,)
        why = f"none, or larger batches than {largest} would form under load, which win an item nothing"
    elif preferred:
        delay_us, why = round(1000 * _DELAY_SHARE * item_ms[1]), "a tenth of what one item takes"
    return Batching(
        preferred=preferred,
        preferred_why=f"measured where it was deployed, with {of}, ms a batch: "
        + ", ".join(f"{size} in {ms:.3g}" for size, ms in sorted(latency_ms.items())),
        queue_delay_us=delay_us,
        queue_delay_why=why,
        queue_size=min(_QUEUE_MAX, max(2 * max_batch, int(1000 * QUEUE_TIMEOUT_S / best_ms))),
        latency_ms=latency_ms,
    )


def _paying(item_ms: Mapping[int, float]) -> tuple[int, ...]:
    """The batch sizes, ascending, that save more time per item than waiting costs."""
    worth, found = item_ms[1], []
    for size, ms in item_ms.items():
        if ms <= (1 - _DELAY_SHARE) * worth:
            worth = ms
            found.append(size)
    return tuple(found)


def unmeasured(preferred: tuple[int, ...], why: str, max_batch: int) -> Batching:
    """Without a measurement nothing waits; requests that queued up while the last batch ran are still merged."""
    return Batching(preferred=preferred, preferred_why=why, queue_size=8 * max_batch)
