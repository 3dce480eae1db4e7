"""The child process of `embed.local`: `python -m dinoexport.embed.worker JOB`, a shard for each line on stdin.

It reports on the file descriptor DINOEXPORT_REPORT with one JSON object per line, and ends as soon as stdin ends, so a
parent that was killed leaves no worker behind.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import Any, TextIO

from dinoexport.embed.embedder import Embedder, Job
from dinoexport.embed.plan import Plan
from dinoexport.errors import DinoexportError
from dinoexport.system.subprocess_job import REPORT


def main(job: Job, report: TextIO) -> None:
    """Embeds the requested shards until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()

    def say(**facts: Any) -> None:
        report.write(json.dumps(facts) + "\n")

    try:
        embedder = Embedder(job)
        say(ready=embedder.runtime)
        while True:
            order = orders.get()
            plan, shard = Plan.model_validate(order["plan"]), int(order["shard"])

            def tick(rows: int, failed: int) -> None:
                say(rows=rows, failed=failed)

            if order["again"]:
                done = embedder.again(plan, shard, tick=tick)
            else:
                begins = (lambda name: say(begins=name)) if order["careful"] else None
                done = embedder.embed(plan, shard, known_bad=order["known_bad"], tick=tick, begins=begins)
            say(done=done.model_dump())
    except DinoexportError as error:
        say(error={"kind": type(error).__name__, "message": error.message, "next_step": error.next_step})


def _listen(orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)  # the main thread may be inside a session, where no exception reaches it


if __name__ == "__main__":
    with os.fdopen(int(os.environ[REPORT]), "w", buffering=1) as _report:
        main(Job.model_validate_json(sys.argv[1]), _report)
