"""The memory of machines and containers, by files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoexport.system import memory

MEMINFO = "MemTotal:       8000 kB\nMemFree:        1000 kB\nMemAvailable:   3000 kB\n"


@pytest.mark.parametrize(
    ("meminfo", "limits", "total", "available"),
    [
        (MEMINFO, (None, None), 8_192_000, 3_072_000),
        (MEMINFO, ("max\n", None), 8_192_000, 3_072_000),
        (MEMINFO, ("4000000\n", None), 4_000_000, 3_072_000),
        (MEMINFO, (None, "2000000\n"), 2_000_000, 2_000_000),
        ("MemTotal: 5 kB\n", (None, None), 5120, 5120),
        (None, ("4000000\n", None), 4_000_000, 4_000_000),
        ("", (None, None), None, None),
        (None, (None, None), None, None),
    ],
)
def test_the_least_of_machine_and_container(
    meminfo: str | None,
    limits: tuple[str | None, str | None],
    total: int | None,
    available: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {}
    for place, content in zip(("/proc/meminfo", *memory._CGROUPS), (meminfo, *limits), strict=True):
        places[place] = tmp_path / place.replace("/", "_")
        if content is not None:
            places[place].write_text(content)
    monkeypatch.setattr(memory, "Path", places.__getitem__)
    assert (memory.total_bytes(), memory.available_bytes()) == (total, available)
