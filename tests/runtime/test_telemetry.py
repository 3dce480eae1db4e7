"""Both runtimes are loaded so that they send nothing: by packages that note how they are loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dinoexport.runtime import telemetry

# As they are: quick tests skip what calls them.
ONNXRUNTIME, OPENVINO = telemetry.onnxruntime, telemetry.openvino
NOTING = """
try:
    import openvino_telemetry
except ImportError:
    sends = False
else:
    sends = True
"""


def test_onnx_runtime_sends_nothing_and_logs_what_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    package: Any = SimpleNamespace(
        disable_telemetry_events=lambda: calls.append("off"), set_default_logger_severity=calls.append
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert ONNXRUNTIME() is package
    assert calls == ["off", 4] and os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO is to be imported; afterwards all is as before."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    del sys.modules["openvino"]


@pytest.mark.parametrize("loaded", [True, False])
def test_openvino_is_loaded_without_what_sends(loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that has loaded the sender itself keeps it."""
    (tmp_path / "openvino.py").write_text(NOTING)
    (tmp_path / "openvino_telemetry.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    sender = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", sender)
    not_loaded(monkeypatch)
    if not loaded:
        del sys.modules["openvino_telemetry"]
    package = OPENVINO()
    assert package.sends is False and sys.modules["openvino"] is package
    assert sys.modules.get("openvino_telemetry") is (sender if loaded else None)


def test_openvino_that_is_loaded_already_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("openvino")
    monkeypatch.setitem(sys.modules, "openvino", package)
    assert OPENVINO() is package


def test_the_sender_is_kept_if_openvino_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino.py").write_text("raise OSError('libopenvino.so')")
    monkeypatch.syspath_prepend(str(tmp_path))
    sender = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", sender)
    not_loaded(monkeypatch)
    with pytest.raises(OSError, match="libopenvino"):
        OPENVINO()
    assert sys.modules["openvino_telemetry"] is sender
