"""Load ONNX Runtime and OpenVINO so that neither sends nor stores anything about its use.

Both are built with telemetry that is on unless it is switched off before they are loaded:

    ONNX Runtime, since 1.32   writes a permanent device id and a queue of events to ~/.cache/Microsoft and sends them
    OpenVINO                   posts to Google Analytics from a separate process, with a permanent id in the home folder

No other module of this package imports them; a test checks that.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from dinoexport.spec import Runtime

_ORT_SWITCH = "ORT_DISABLE_TELEMETRY"
_OPENVINO_SENDER = "openvino_telemetry"

_FATAL = 4


def onnxruntime() -> Any:
    """The package `onnxruntime` with telemetry off, whatever the environment says."""
    os.environ[_ORT_SWITCH] = "1"  # read when its library is loaded; child processes inherit it
    import onnxruntime as package

    package.disable_telemetry_events()  # for a program that had loaded it before us
    # It writes to the terminal by itself, in colours and with a graph's own names; what fails is raised as well.
    package.set_default_logger_severity(_FATAL)
    return package


def openvino() -> Any:
    """The package `openvino` without telemetry: the package that would send it cannot be imported."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    before = sys.modules.get(_OPENVINO_SENDER)
    sys.modules[_OPENVINO_SENDER] = None  # type: ignore[assignment]  # makes an import of it fail
    try:
        import openvino as package
    finally:
        del sys.modules[_OPENVINO_SENDER]
        if before is not None:
            sys.modules[_OPENVINO_SENDER] = before
    return package


def findings() -> dict[Runtime, str]:
    """The disabled telemetry by runtime, for `doctor`."""
    return {
        Runtime.ONNXRUNTIME: f"telemetry off: {_ORT_SWITCH}=1 is set before it is loaded",
        Runtime.OPENVINO: f"telemetry off: it is loaded without {_OPENVINO_SENDER}",
    }
