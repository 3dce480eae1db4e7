"""An S3 server in a process of its own, for tests: moto's, from an environment of its own."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from pathlib import Path

PYTHON = Path(__file__).parent.parent.parent / ".interop" / "s3" / "bin" / "python"


def missing() -> str:
    """Why there is no server here; empty when there is one."""
    return "" if PYTHON.exists() else "no S3 server here: make .interop/.ready installs one"


class S3Server:
    """A running server. environment: what makes clients use it."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [str(PYTHON), "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "an-id",
            "AWS_SECRET_ACCESS_KEY": "a-secret-key",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=2).close()
                break
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.stop()
                    raise
                time.sleep(0.1)
        request = urllib.request.Request(f"{self.url}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def stop(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()
