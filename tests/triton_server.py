"""A real tritonserver for tests and load runs: NVIDIA's wheel as `make` lays it out in `.triton`, on free ports.

The wheel holds the Python backend alone; its models run on the environment in `.triton/python`, which has NumPy 1.26.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent.parent / ".triton"
_WHEEL = HOME / "server" / "pytriton" / "tritonserver"
BINARY = _WHEEL / "bin" / "tritonserver"
_START_S = 300.0  # a cold disk and two servers at once took 71 s to the first line of the log


def missing() -> str:
    """Why there is no server here, or nothing."""
    return "" if BINARY.is_file() else f"no Triton server: make puts one in {HOME.name} where NVIDIA's wheel can be had"


def environment() -> dict[str, str]:
    """What the server's and perf_analyzer's processes need to find their libraries and the models' Python."""
    libraries = [HOME / "server" / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"), HOME / "lib"]
    return {
        "PATH": f"{HOME / 'python' / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "HOME": str(HOME),
    }


class Server:
    """One tritonserver over a model repository; `options` are its own."""

    def __init__(self, repository: Path, scratch: Path, *options: str) -> None:
        self.repository, self.log = repository, scratch / "tritonserver.log"
        self._shared_memory = f"dinoexport_{uuid.uuid4().hex[:8]}"
        self._options = options
        self._backends = scratch / "backends" / "python"
        self._backends.mkdir(parents=True, exist_ok=True)
        stub = next((_WHEEL / "python_backend_stubs").glob("3.11/triton_python_backend_stub"))
        for file in (*(_WHEEL / "backends" / "python").iterdir(), stub):
            link = self._backends / file.name
            if not link.is_symlink():
                link.symlink_to(file)  # a copy would lose its library path
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.start()

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"grpc://127.0.0.1:{self.grpc_port}"

    def start(self) -> None:
        """Starts the process and waits until it says that it is ready.

        One server at a time: where starting ones compete for the CPU, locks of Triton's Python backend time out and the
        server ends with boost::interprocess::lock_exception (triton-inference-server/server#8882).
        """
        with (HOME / "starting").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            self._start()

    def _start(self) -> None:
        ports = [
            f"--{kind}-{option}={value}"
            for kind, port in (("http", self.http_port), ("grpc", self.grpc_port), ("metrics", self.metrics_port))
            for option, value in (("port", port), ("address", "127.0.0.1"))
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    BINARY,
                    f"--model-repository={self.repository}",
                    f"--backend-directory={self._backends.parent}",
                    f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
                    "--allow-gpu-metrics=false",
                    "--exit-timeout-secs=5",
                    *ports,
                    *self._options,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not self.ready():
            gone = self.process.poll() is not None
            if gone or time.monotonic() > deadline or b"error while loading shared" in self.log.read_bytes():
                self.kill()
                raise RuntimeError(f"tritonserver did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.05)

    def ready(self) -> bool:
        try:
            return self.ask("GET", "/v2/health/ready")[0] == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: bytes | str = b"", headers: dict[str, str] | None = None) -> Any:
        """(status, body) of one plain HTTP request; JSON is parsed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()  # an open keep-alive would hold the server's exit up
        try:
            return response.status, json.loads(content)
        except ValueError:
            return response.status, content.decode(errors="replace")

    def load(self, model: str) -> Any:
        return self.ask("POST", f"/v2/repository/models/{model}/load")

    def unload(self, model: str) -> Any:
        return self.ask("POST", f"/v2/repository/models/{model}/unload")

    def metrics(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=10)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def stubs(self, model: str) -> list[int]:
        """Process ids of the Python backend's processes that run `model`; of all models for an empty name."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0") if folder.name.isdigit() else []
            except OSError:
                continue
            ours = self._shared_memory.encode() in b" ".join(words)
            if ours and f"{self.repository}/{model}{'/' if model else ''}".encode() in b" ".join(words):
                found.append(int(folder.name))
        return found

    def kill(self, *, gently: bool = False) -> None:
        """Ends the server and every process it started; with `gently` it may finish what it is doing."""
        if gently and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in Path("/dev/shm").glob(f"{self._shared_memory}*"):
            region.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
