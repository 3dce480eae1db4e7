"""Real servers for tests, each in a process of its own: Azurite, Docker's registry, WebDAV. `make stores` gets them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from email.utils import formatdate
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
AZURITE = ROOT / ".stores" / "azure" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
REGISTRY = ROOT / ".stores" / "registry" / "usr" / "bin" / "docker-registry"
WEBDAV = ROOT / ".stores" / "webdav"
# Microsoft publishes this account and its key for the emulator.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
USER, PASSWORD = "somebody", "a-secret-password"
_HTPASSWD = f"{USER}:$2b$04$R5PqIotflwF75B/zE/7T4OSROEY1kEaiUR4C8vncANFh/PskJCQNm\n"


class Server:
    """A running process that answers on `port`."""

    def __init__(self, words: list[str], port: int, **environment: str) -> None:
        self.port = port
        self._process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment or None
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            except urllib.error.HTTPError:
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.stop()
                    raise
                time.sleep(0.1)
            else:
                return

    def stop(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def azurite() -> tuple[Server, dict[str, str]]:
    """Microsoft's emulator of Azure's blob storage with a container `bucket`, and the environment that names it."""
    port = free_port()
    words = ["--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    server = Server(["node", str(AZURITE), *words], port)
    address = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "PUT" + "\n" * 12 + "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed += f"/{_ACCOUNT}/{_ACCOUNT}/bucket\nrestype:container"
    digest = hmac.new(base64.b64decode(_KEY), signed.encode(), hashlib.sha256).digest()
    headers |= {"Authorization": f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}", "Content-Length": "0"}
    request = urllib.request.Request(f"{address}/bucket?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=10).close()
    return server, {
        "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
        "AZURE_ENDPOINT": address,
    }


def registry(folder: Path, *, private: bool) -> Server:
    """Docker's own registry, in memory. private: it asks for USER and PASSWORD."""
    port = free_port()
    (folder / "htpasswd").write_text(_HTPASSWD)
    lock = f"auth: {{htpasswd: {{realm: tests, path: {folder / 'htpasswd'}}}}}\n" if private else ""
    (folder / "config.yml").write_text(
        f'version: 0.1\nstorage: {{inmemory: {{}}}}\nhttp: {{addr: "127.0.0.1:{port}"}}\n{lock}'
    )
    return Server([str(REGISTRY), "serve", str(folder / "config.yml")], port)


def webdav(folder: Path) -> Server:
    """A web server that lists its files, with nobody's name asked for."""
    port = free_port()
    words = ["--host", "127.0.0.1", "--port", str(port), "--root", str(folder), "--auth", "anonymous", "--no-config"]
    begin = "from wsgidav.server.server_cli import run; run()"
    return Server([sys.executable, "-c", begin, *words], port, PYTHONPATH=str(WEBDAV))
