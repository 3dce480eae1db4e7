"""Draw docs/images/dashboard.png: the Grafana board's panels, from a real Triton server's metrics in a real Prometheus.

`python -m scripts.dashboard_picture BUNDLE` serves the bundle for two minutes under changing load. Prometheus evaluates
the board's own expressions; matplotlib draws them where the board's grid puts them, because Grafana is in no package
registry. Needs Prometheus (apt-get install prometheus) and the server that `make test` sets up.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dinoexport.bundle import REFERENCE, reference_file
from dinoexport.errors import DinoexportError
from dinoexport.serving.client import DinoClient
from dinoexport.serving.triton import model_repository
from scripts.pictures import save
from tests.triton_server import Server, free_ports, missing

BOARD = Path(__file__).parent.parent / "serving" / "monitoring" / "dashboard.json"
# Requests in flight, and for how many seconds.
LOAD = ((1, 30), (4, 30), (0, 15), (8, 30), (2, 15))
STEP_S = 2
_RATE = "12s"
_LEGEND_MAX = 6
_UNITS = {"bytes": (1e-6, "MB"), "µs": (1e-3, "ms"), "percentunit": (100.0, "%"), "reqps": (1.0, "requests/s")}


@contextmanager
def prometheus(scrape: str, folder: Path) -> Iterator[str]:
    """The address of a Prometheus that reads `scrape`."""
    binary = shutil.which("prometheus")
    if binary is None:
        sys.exit("Prometheus is not installed: apt-get install prometheus")
    targets = [{"job_name": "triton", "static_configs": [{"targets": [scrape]}]}]
    (folder / "prometheus.yml").write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": targets}))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    words = [binary, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    process = subprocess.Popen([*words, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def under_load(url: str, inputs: Any) -> None:
    """Sends requests in the phases of LOAD; now and then one that the server refuses."""
    for in_flight, seconds in LOAD:
        end = time.monotonic() + seconds

        def ask(end: float = end) -> None:
            client = DinoClient(url)
            while time.monotonic() < end:
                with suppress(DinoexportError):
                    client(inputs)

        workers = [threading.Thread(target=ask) for _ in range(in_flight)]
        for worker in workers:
            worker.start()
        time.sleep(max(0.0, end - time.monotonic()))
        for worker in workers:
            worker.join()


def series(address: str, expression: str, start: float, end: float) -> list[dict[str, Any]]:
    """What Prometheus answers to a panel's expression over the time of the load."""
    expression = expression.replace("$model", ".*").replace("$__rate_interval", _RATE)
    query = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": STEP_S})
    with urllib.request.urlopen(f"{address}/api/v1/query_range?{query}") as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def draw(board: dict[str, Any], answers: dict[int, list[tuple[str, list[dict[str, Any]]]]], start: float) -> bytes:
    """The panels where the board's grid has them, 24 columns wide."""
    from io import BytesIO

    import matplotlib.pyplot as plt

    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    with plt.style.context("dark_background"):
        figure = plt.figure(figsize=(12, rows * 0.29), facecolor="#111217")
        grid = figure.add_gridspec(rows, 24, left=0.04, right=0.985, top=0.97, bottom=0.01, hspace=0, wspace=2.5)
        figure.suptitle(board["title"], x=0.05, ha="left")
        for panel in board["panels"]:
            place = panel["gridPos"]
            down = slice(place["y"] + 1, place["y"] + place["h"] - 1)  # a row each for the title and the axis
            across = slice(place["x"], place["x"] + place["w"])
            axes = figure.add_subplot(grid[down, across], facecolor="#181b1f")
            factor, unit = _UNITS.get(panel["fieldConfig"]["defaults"].get("unit", ""), (1.0, ""))
            for legend, found in answers[panel["id"]]:
                for line in found:
                    label = legend
                    for key, value in line["metric"].items():
                        label = label.replace("{{" + key + "}}", value)
                    times = [float(at) - start for at, _ in line["values"]]
                    values = [float(value) * factor for _, value in line["values"]]
                    axes.plot(times, values, label=" ".join(label.split("{{")[0].split()), linewidth=1.2)
            axes.set_title(f"{panel['title']}{unit and f', {unit}'}", fontsize=9, loc="left")
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.15)
            axes.set_ylim(bottom=0)
            if 0 < len(axes.lines) <= _LEGEND_MAX:
                axes.legend(fontsize=7, frameon=False, loc="upper left")
        stored = BytesIO()
        figure.savefig(stored, dpi=90, facecolor=figure.get_facecolor())
    return stored.getvalue()


def main() -> None:
    """Serves the bundle named on the command line, under load, and draws the board."""
    if why := missing():
        sys.exit(why)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server does not outlive it
    built = Path(sys.argv[1])
    board = json.loads(BOARD.read_text())
    case = next(e.case for e in reference_file.read(built / REFERENCE).expectations if e.case.name == "evaluation_size")
    inputs = {name: array[:1] for name, array in case.inputs.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_repository.deploy(built, folder / "models", backend="python", triton="24.10")
        server = Server(folder / "models", folder)
        try:
            with prometheus(f"127.0.0.1:{server.metrics_port}", folder) as address:
                start = time.time()
                under_load(server.grpc, inputs)
                answers = {
                    panel["id"]: [
                        (target["legendFormat"], series(address, target["expr"], start, time.time()))
                        for target in panel["targets"]
                    ]
                    for panel in board["panels"]
                }
        finally:
            server.kill()
    save("dashboard.png", draw(board, answers, start))


if __name__ == "__main__":
    main()
