"""The memory that this machine has for a process, as Linux and the process's container report it."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total_bytes() -> int | None:
    """All memory, or the limit of the container; None if the system does not report it."""
    found = [size for size in (_meminfo("MemTotal"), *map(_limit, _CGROUPS)) if size is not None]
    return min(found, default=None)


def available_bytes() -> int | None:
    """The memory that a new process can use without swapping; None if the system does not report it."""
    found = [size for size in (_meminfo("MemAvailable"), total_bytes()) if size is not None]
    return min(found, default=None)


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((int(size) * 1024 for size in sizes), None)


def _limit(path: str) -> int | None:
    try:
        word = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(word) if word.isdigit() else None
