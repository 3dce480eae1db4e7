"""The CPU's name, which says what was measured is comparable with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinoexport.runtime import cpu
from dinoexport.runtime.table import RuntimeFacts
from dinoexport.spec import Runtime

CPUINFO = "processor\t: {n}\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2{more}\ncache size\t: 512 KB\n\n"


def of(monkeypatch: pytest.MonkeyPatch, content: str) -> str:
    def read(path: Path, *_: Any, **__: Any) -> str:
        assert path == Path("/proc/cpuinfo")
        return content

    monkeypatch.setattr(Path, "read_text", read)
    return cpu.machine()


def test_a_cpu_s_name_says_which_instructions_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines give CPUs with and without AVX-512 one name, and one of them is three times as fast."""
    old = "".join(CPUINFO.format(n=n, more="") for n in range(2))
    new = "".join(CPUINFO.format(n=n, more=" avx512_vnni avx512f") for n in range(2))
    assert of(monkeypatch, old) == "AMD EPYC (avx2)"
    assert of(monkeypatch, new) == "AMD EPYC (avx2, avx512f, avx512_vnni)"


def test_an_arm_cpu_has_no_name_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert of(monkeypatch, "processor\t: 0\nFeatures\t: fp asimd asimddp bf16\n") == "aarch64 (asimddp, bf16)"
    assert of(monkeypatch, "") == "aarch64"


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000\n", 3), ("900000 100000\n", 3), ("200000 100000\n", 2), ("160000 100000\n", 2),
        ("140000 100000\n", 1), ("20000 100000\n", 1), ("no quota\n", 3), ("", 3), (None, 3),
    ],
)  # fmt: skip
def test_the_cpus_of_a_process_are_those_of_its_affinity_or_its_container(
    quota: str | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    monkeypatch.setattr(cpu, "Path", {"/sys/fs/cgroup/cpu.max": file}.__getitem__)
    monkeypatch.setattr("os.sched_getaffinity", {0: {4, 5, 7}}.__getitem__)
    assert cpu.usable_cpus() == cpus


def test_a_runtimes_version_is_empty_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, version in (("2.1", "2.1"), (None, "")):
        monkeypatch.setattr(RuntimeFacts, "installed_version", lambda _facts, installed=installed: installed)
        assert cpu.version(Runtime.OPENVINO) == version
        assert cpu.title(Runtime.OPENVINO) == f"OpenVINO {version}"
