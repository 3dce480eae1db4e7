"""`tensorrt` for a process that `bindings.py` starts: NVIDIA's bindings of one version over the fake library."""

import os

import tensorrt_bindings
from tensorrt_bindings import *
from tensorrt_bindings import __version__ as __version__

from tests.standin import compiler
from tests.standin.driven import Driven
from tests.standin.gpu import Device

device = Device(failing=os.environ.get("STANDIN_FAILING", ""))
device.severity = tensorrt_bindings.ILogger.Severity
_version = tuple(int(part) for part in __version__.split(".")[:4])
device.more_kinds = {
    "Builder": lambda _device, _logger: compiler.Builder(_version),
    "OnnxParser": lambda _device, network, _logger: compiler.OnnxParser(network),
}
driven = Driven(tensorrt_bindings, device)
