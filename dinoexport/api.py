"""The Python front door: `build` and `load` return a `Bundle`, which you call, validate and ask for its manifest.

`import dinoexport` loads this module when one of its names is first used. Opening and running a bundle imports neither
torch nor onnx.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypeGuard

from dinoexport import bundle, family, images
from dinoexport.bundle import Manifest, in_store
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import InputRefused, MissingRequirement, UsageError, ValidationFailed
from dinoexport.family import FrontEnd, Model
from dinoexport.runtime import cpu, runners
from dinoexport.runtime.sizes import Form, Specialised
from dinoexport.spec import Array, Arrays, Graph, Precision, Progress, Runtime, closest, silent
from dinoexport.system import changes, store
from dinoexport.system.untrusted import Identity

if TYPE_CHECKING:
    from PIL import Image

    from dinoexport.spec import Candidate
    from dinoexport.validation.evaluate import Judge
    from dinoexport.validation.validate_bundle import Validated

    # One image: its path, its encoded bytes, or a Pillow image.
    ImageLike: TypeAlias = str | PathLike[str] | bytes | Image.Image
    # What a bundle can be called with: images, the graph's only input, or all of its inputs by name.
    Inputs: TypeAlias = ImageLike | Sequence[ImageLike] | Array | Arrays

Device = Literal["cpu", "gpu"]
_DEVICES: tuple[Device, ...] = ("cpu", "gpu")


class OutputsDiffer(ValidationFailed):
    """The bundle's outputs are not PyTorch's on this machine. `validated` has every figure."""

    def __init__(self, message: str, *, next_step: str, validated: Validated) -> None:
        super().__init__(message, next_step=next_step)
        self.validated = validated


class Bundle:
    """A bundle, ready to run: call it with images or arrays.

        with dinoexport.load("bundles/vits14-fp32-cpu") as bundle:
            tokens = bundle(["photograph.jpg"])

    The model is opened at the first call, in the runtime that validated the bundle, and closed by `close` or at the end
    of a `with` block. Several threads may call one bundle; they take turns.

    Attributes:
        folder: Where the bundle is.
        manifest: What the bundle says about itself; `manifest.verdict` is "passed", "rejected" or "unjudged".
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int,
        device: Device | None,
        trusted: bool = False,
        sizes: Sequence[str] = (),
        seen: Mapping[str, Identity] = MappingProxyType({}),
        record: bool = True,
    ) -> None:
        """Use `load` or `build`. trusted: whether code that an engine holds may run; seen: files that were checked.

        record: whether `validate` may write its result into the manifest.
        """
        self.folder, self.manifest = folder, manifest
        self._threads, self._device = threads, device
        self._trusted, self._seen, self._record = trusted, seen, record
        self._recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
        self._model: Model = family.find(manifest.family).model(self._recipe)
        self._lock = threading.Lock()
        self._sizes = (*self._recipe.sizes, *sizes)
        self._specialised: tuple[Specialised, ...] = ()
        self._opened: tuple[Candidate, str] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Bundle {self.folder}: {self.manifest.variant}, {self.manifest.precision}, {self.manifest.verdict}>"

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The inputs, outputs and dimensions of the bundle's graphs."""
        return tuple(facts.graph() for facts in self.manifest.graphs)

    @property
    def runs_on(self) -> str:
        """The runtime, its version and the precision that compute a call, in words. Opens the model."""
        with self._lock:
            return self._candidate()[1]

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms for one size that were compiled beside the general one on a CPU, with the memory they take."""
        return tuple(form for graph in self._specialised for form in graph.forms)

    def __call__(self, inputs: Inputs, *, front_end: str | None = None) -> dict[str, Array]:
        """The model's outputs as NumPy arrays, by name.

        Args:
            inputs: Images (paths, encoded bytes, Pillow images; one or a sequence), which are prepared as the
                validation prepares its photographs and run in batches that the graph takes. Or arrays: the graph's
                only input, or a mapping with all inputs by name, as `graphs` describes them.
            front_end: How images are prepared, if the model has several ways.

        Raises:
            InputRefused: The inputs are not what the graph takes, or an image cannot be read.
            MissingRequirement: The runtime or the device is missing on this machine.
        """
        with self._lock:
            candidate, _ = self._candidate()
            if isinstance(inputs, Mapping):
                return candidate(inputs)
            if _is_array(inputs):
                return candidate({self._only_input(): inputs})
            answers = [candidate(batch) for batch in self._prepared(_items(inputs), front_end)]
        import numpy as np

        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def validate(
        self,
        *,
        images: str | PathLike[str] | None = None,
        weights: str | None = None,
        head_weights: str | None = None,
        reference: Judge = "plain",
        progress: Progress = silent,
    ) -> Validated:
        """Checks every byte of the bundle and validates it on this machine, like `dinoexport validate`.

        Args:
            images: A folder of images to compare with PyTorch on, instead of the reference in the bundle. Needs torch
                and the weights.
            weights: Where the weights of the bundle are, if not where the manifest says.
            head_weights: The same for its head.
            reference: Whose code computes PyTorch's outputs for `images`: "plain" or "hub".
            progress: Called with (what is done, units done, units in all).

        Returns:
            The verdict with every figure. The manifest is read again: a validated engine is recorded there.

        Raises:
            OutputsDiffer: A figure is over its limit.
            ValidationFailed: The bundle is damaged.
        """
        from dinoexport.validation import validate_bundle

        if self._device == "gpu":
            with self._lock:
                self._candidate()  # an error if it cannot run there, not a verdict on the CPU
        validated = validate_bundle.validate(
            self.folder,
            images=None if images is None else Path(images),
            weights=weights,
            head_weights=head_weights,
            runtime=self._runtime(),
            judge_code=reference,
            trust_plan=self._trusted,
            record=self._record,
            progress=progress,
        )
        self.manifest = validated.manifest
        if not validated.report.passed:
            raise OutputsDiffer(
                f"{self.folder} does not give PyTorch's outputs on this machine.",
                next_step="validated.report.rows has each figure with its limit.",
                validated=validated,
            )
        return validated

    def close(self) -> None:
        """Releases the runtime's memory. A closed bundle cannot be called."""
        with self._lock:
            self._opened, self._closed = None, True
            for graph in self._specialised:
                graph.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _candidate(self) -> tuple[Candidate, str]:
        if self._closed:
            raise UsageError(f"{self.folder} was closed.", next_step="Load it again.")
        if self._opened is None:
            with changes.reading(self.folder):
                opened = self._open()
                bundle.check_same(self.folder, self._seen)
            self._opened = opened
        return self._opened

    def _open(self) -> tuple[Candidate, str]:
        if runners.is_for_gpu(self.manifest) and self._device != "cpu":
            try:
                there = runners.open_on_gpu(self._model, self.folder, self.manifest, trusted=self._trusted)
                return there.candidate, there.name
            except MissingRequirement:
                if self._device == "gpu":
                    raise
        elif self._device == "gpu":
            raise UsageError(f"{self.folder} has no engine for a GPU.", next_step="Leave the device out.")
        graphs = {self.folder / facts.file: facts.graph() for facts in self.manifest.graphs}
        way = replace(runners.way_of(self.manifest), threads=self._threads)
        opened = cpu.open_for_sizes(graphs, way, named=self._sizes)
        self._specialised = tuple(graph for graph in opened.values() if isinstance(graph, Specialised))
        return runners.driven(self._model, opened), runners.candidate_name(self.manifest.precision, way, {})

    def _runtime(self) -> Runtime | None:
        if self._device == "cpu":
            return runners.built_way(self.manifest).runtime
        return self.manifest.engines[0].runtime if self._device == "gpu" and self.manifest.engines else None

    def _only_input(self) -> str:
        inputs = [tensor.name for graph in self.graphs for tensor in graph.inputs]
        if len(inputs) != 1:
            raise InputRefused(
                f"One array is not enough: the graphs take {', '.join(inputs)}.",
                next_step="Give a mapping from names to arrays.",
            )
        return inputs[0]

    def _prepared(self, items: Sequence[ImageLike], wanted: str | None) -> Iterator[Arrays]:
        """Batches of the graph's inputs, made of encoded items."""
        if not items:
            raise InputRefused("There is no image in an empty sequence.", next_step="Give one or more images.")
        front_end = self._front_end(wanted)
        graph = next(graph for graph in self.graphs if graph.name == front_end.graph)
        first = graph.inputs[0].shape[0]
        most = next((dim.max for dim in graph.dims if dim.name == first), 1)
        for start in range(0, len(items), most):
            encoded = [images.encoded(item) for item in items[start : start + most]]
            yield self._model.prepare(front_end.name, front_end.settings, encoded)

    def _front_end(self, wanted: str | None) -> FrontEnd:
        ends = {end.name: end for end in self._model.front_ends(None, progress=silent)}
        name = next(iter(ends), "") if wanted is None else wanted
        if name not in ends:
            raise UsageError(
                f"{self.manifest.variant} has no front end {name!r}.{closest(name, tuple(ends))}"
                if name
                else f"{self.manifest.variant} takes arrays, not files.",
                next_step=f"It has: {', '.join(ends)}." if ends else "Give a mapping from input names to arrays.",
            )
        return ends[name]


def load(
    folder: str | PathLike[str],
    *,
    threads: int = 0,
    device: Device | None = None,
    check: bool = True,
    verify: str | PathLike[str] | None = None,
    trust_plan: bool = False,
    sizes: Sequence[str] = (),
    progress: Progress = silent,
) -> Bundle:
    """Opens the bundle in `folder`.

    Args:
        folder: The bundle's folder, or its URL in an object store or on a web server: then a copy in the cache is used,
            which is downloaded once.
        threads: CPU threads of the runtime; 0 leaves their number to the runtime.
        device: "cpu" runs the ONNX on the CPU; "gpu" the engine, or if the bundle is for a GPU and has none, the ONNX
            through ONNX Runtime's CUDA provider. None: what the bundle has for a GPU if it runs here, else the CPU.
        check: Compare the size and SHA-256 of every file with the manifest first.
        verify: A public key; a bundle that its owner did not sign is refused.
        trust_plan: Run a version-compatible plan, which holds code, without `verify`.
        sizes: Sizes that are often requested, as "224x224" or "8x518x518": on a CPU each gets its own form, compiled
            in the background, beside the general one. Others get one after 32 calls.
        progress: Called with (what is done, units done, units in all).

    Raises:
        UsageError: The folder is not a bundle.
        ValidationFailed: The bundle is damaged, or not signed by the owner of `verify`.
        MissingRequirement: The store cannot be reached or refuses.
    """
    if device is not None and device not in _DEVICES:
        raise UsageError(f"device {device!r} is unknown.{closest(device, _DEVICES)}", next_step="Use 'cpu' or 'gpu'.")
    if threads < 0:
        raise UsageError(f"threads is {threads}.", next_step="Use a positive number, or 0 for the runtime's choice.")
    remote = isinstance(folder, str) and store.is_url(folder)
    path = in_store.local_copy(str(folder), progress=progress) if remote else Path(folder)
    seen: Mapping[str, Identity] = {}
    if verify is not None:
        from dinoexport.bundle import signing

        manifest = signing.verify(path, Path(verify)).manifest
    else:
        changes.settle(path)
        manifest = bundle.read_manifest(path)
    if check:
        with changes.reading(path):
            seen = bundle.check_files(path, manifest.files, progress=progress)
            bundle.check_graphs(path, manifest)
    trusted = trust_plan or verify is not None
    return Bundle(
        path, manifest, threads=threads, device=device, trusted=trusted, sizes=sizes, seen=seen, record=not remote
    )


def build(
    variant: str | PathLike[str] | None = None,
    *,
    weights: str | PathLike[str] | None = None,
    head: str | None = None,
    head_weights: str | PathLike[str] | None = None,
    prefix: str | None = None,
    precision: str | None = None,
    target: str | None = None,
    runtime: str | None = None,
    profiles: Sequence[str] = (),
    preset: Literal["fast", "balanced", "max"] | None = None,
    out: str | PathLike[str] | None = None,
    force: bool = False,
    keep_rejected: bool = False,
    reference: Judge = "plain",
    threads: int = 0,
    device: Device | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Builds a bundle like `dinoexport build`, and opens it. Needs torch.

    Args:
        variant: A shipped variant, or the path of a recipe. None: made from the weights and the files beside them.
        weights: A checkpoint's path, or "synthetic:SEED". None: the published weights.
        head: What turns tokens into depth, labels or classes, as "nyu_dpt". None: the recipe's.
        head_weights: The head's file, or "synthetic:SEED". None: the published one.
        prefix: The prefix of tensor names that selects one of several models in the file.
        precision: "fp32", "fp16", "bf16", "int8", "int4" or "auto". None: the recipe's, else the target's first.
        target: The machine to build for. None: the GPU of this machine, else "cpu".
        runtime: One of the target's runtimes. None: the first that can be used.
        profiles: Names of the engine's profiles. Empty: the recipe's.
        preset: How long TensorRT searches for kernels.
        out: The bundle's folder, or a URL to send it to. None: bundles/NAME in the working directory.
        force: Repeat finished stages.
        keep_rejected: Publish a bundle that fails too, marked rejected, before Rejected is raised.
        reference: Whose code computes PyTorch's outputs: "plain" or "hub".
        threads: As for `load`.
        device: As for `load`.
        progress: Called with (what is done, units done, units in all).

    Raises:
        Rejected: The outputs are not PyTorch's; `report` says where. A ValidationFailed.
        UsageError, WeightsError, MissingRequirement, BuildError: As the command line reports them.
    """
    from dinoexport.pipeline import build as pipeline

    place = None if out is None else str(out)
    with in_store.destination(place, sending=lambda: nullcontext(progress)) as made_in:
        request = pipeline.build_request(
            None if variant is None else str(variant),
            weights=None if weights is None else str(weights),
            head=head,
            head_weights=None if head_weights is None else str(head_weights),
            prefix=prefix,
            precision="auto" if precision == "auto" else _member(Precision, "precision", precision),
            target=target,
            runtime=_member(Runtime, "runtime", runtime),
            engine_choices=({"profiles": tuple(profiles)} if profiles else {}) | ({"preset": preset} if preset else {}),
            out=made_in,
            judge_code=reference,
            progress=progress,
        )
        built = pipeline.build(request, force=force, keep_rejected=keep_rejected, progress=progress)
    recorded = place is None or not store.is_url(place)
    return Bundle(built.folder, built.manifest, threads=threads, device=device, trusted=True, record=recorded)


def _member(kind: Any, named: str, word: str | None) -> Any:
    """The member of an enumeration that `word` names; None for None."""
    if word is None:
        return None
    if word not in tuple(kind):
        raise UsageError(
            f"{named} {word!r} is unknown.{closest(word, tuple(kind))}", next_step=f"Use {', '.join(kind)}."
        )
    return kind(word)


def _is_array(inputs: Any) -> TypeGuard[Array]:
    """Whether `item` is a NumPy array. A Pillow image has an array interface too, but no `ndim`."""
    return hasattr(inputs, "__array_interface__") and hasattr(inputs, "ndim")


def _items(inputs: Any) -> Sequence[ImageLike]:
    return list(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes) else [inputs]
