"""A stand-in for TensorRT's builder, behind its own bindings: it writes down what it is asked and compiles nothing.

The "plan" names the ONNX and the largest shape of each profile, so that the runtime's stand-in can run it. Progress is
told from several threads at once, as TensorRT does, whose bindings take a False or an error for a wish to cancel.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoexport.spec import Profile
from tests.standin import gpu


@dataclass
class Tensor:
    """An ITensor that is an input of the network."""

    name: str
    shape: tuple[int, ...]
    is_shape_tensor: bool = False


@dataclass
class Network:
    """An INetworkDefinition, filled by the parser."""

    flags: int
    onnx: str = ""
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]


@dataclass
class OnnxParser:
    """An IParser."""

    network: Network

    def parse_from_file(self, model: str) -> bool:
        import onnx

        self.network.onnx = model
        for value in onnx.load(model, load_external_data=False).graph.input:
            dims = value.type.tensor_type.shape.dim
            self.network.inputs.append(Tensor(value.name, tuple(dim.dim_value or -1 for dim in dims)))
        return True


@dataclass
class OptimizationProfile:
    """An IOptimizationProfile."""

    shapes: dict[str, Any] = field(default_factory=dict)

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002 (TensorRT's names)
        self.shapes[input] = tuple(map(tuple, (min, opt, max)))


class TimingCache:
    """An ITimingCache."""

    def serialize(self) -> bytes:
        return b"timings"


@dataclass
class Config:
    """An IBuilderConfig. flags: the numbers of those that are set."""

    set_flags: set[int] = field(default_factory=lambda: {6})  # TF32 is on by default
    profiles: list[OptimizationProfile] = field(default_factory=list)
    progress_monitor: Any = None
    hardware_compatibility_level: Any = None
    builder_optimization_level: int = 3

    def set_flag(self, flag: Any) -> None:
        self.set_flags.add(int(flag.value))

    def clear_flag(self, flag: Any) -> None:
        self.set_flags.discard(int(flag.value))

    def get_flag(self, flag: Any) -> bool:
        return int(flag.value) in self.set_flags

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> TimingCache:
        return TimingCache()

    def get_timing_cache(self) -> TimingCache:
        return TimingCache()


@dataclass
class Builder:
    """An IBuilder."""

    version: tuple[int, ...]

    def create_network(self, flags: int = 0) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        if not progress_from_many_threads(config.progress_monitor):
            return None  # cancelled
        print(f"[stand-in] flags {sorted(config.set_flags)}, level {config.builder_optimization_level}")
        profiles = [Profile(name=str(at), shapes=made.shapes) for at, made in enumerate(config.profiles)]
        return gpu.plan(Path(network.onnx), profiles, version=self.version)


def progress_from_many_threads(monitor: Any, threads: int = 8, steps: int = 200) -> bool:
    """Whether the monitor let the build go on, whatever it was told and from wherever."""
    went_on = [True]

    def tell(number: int) -> None:
        try:
            for step in range(steps):
                name = f"phase {step % 3}"
                monitor.phase_start(name, "Building", number + 1)
                went_on.append(monitor.step_complete(name, step) is True)
                monitor.phase_finish(name)
        except Exception as error:
            print(f"[stand-in] the monitor raised {error!r}")
            went_on.append(False)

    monitor.phase_start("Building", None, steps)
    telling = [threading.Thread(target=tell, args=(number,)) for number in range(threads)]
    for thread in telling:
        thread.start()
    for thread in telling:
        thread.join()
    monitor.phase_finish("Building")
    return all(went_on)
