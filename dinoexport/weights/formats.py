"""Open weight files: the shapes of their tensors, and a reader of each. No pickled code is ever run."""

from __future__ import annotations

import json
import re
import shlex
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from dinoexport.errors import WeightsError, require
from dinoexport.family import Read, Shapes
from dinoexport.spec import Array
from dinoexport.system import untrusted
from dinoexport.system.untrusted import Unreadable
from dinoexport.weights import gguf_file, mapped_tensors, pickle_check, shards, torch_zip, unusable
from dinoexport.weights.mapped_tensors import Stored
from dinoexport.weights.shards import SplitAxis

if TYPE_CHECKING:
    import torch

# The number of bytes of a mapped file that may be read before it is mapped again.
_MAPPED_BYTES_MAX = 16 * 2**20
_ZIP_START = b"PK\x03\x04"
# Far above any training checkpoint; in a hostile file a dict can contain itself, or occur a million times.
_DICTS_DEEP_MAX = 8
_ENTRIES_MAX = 200_000
# Classes that trainers store beside tensors: settings, paths, scalars. They are not imported, see `_Inert`.
_INERT = re.compile(
    r"^(argparse\.Namespace|types\.SimpleNamespace|pathlib\.|datetime\.|uuid\.|enum\.|typing\.|fractions\.|decimal\.|"
    r"(builtins|__builtin__)\.(list|dict|set|frozenset|tuple|int|float|complex|str|bool|slice|range|bytearray)$|"
    r"collections\.(defaultdict|Counter|deque|OrderedDict)$|_codecs\.encode$|numpy(\.|$)|omegaconf\.|yacs\.|addict\.|easydict\.|"
    r"ml_collections\.|box\.|mmengine\.|mmcv\.|fvcore\.|iopath\.|pytorch_lightning\.|lightning\.|lightning_fabric\.|"
    r"transformers\.(training_args|trainer_utils|integrations)|hydra\.|timm\.)"
)
_LIKE_DICT = re.compile(r"\.(defaultdict|AttributeDict|AttrDict|Dict|ConfigDict|EasyDict|Box)$")
# What a safetensors file calls the numbers that NumPy reads -> NumPy's name of them.
_NUMPY_READS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What a safetensors file begins with: the length of its header, JSON, which the numbers follow.
_HEADER_LENGTH = struct.Struct("<Q")
_Kind = TypeVar("_Kind")
# `torch.serialization.safe_globals` affects the whole process while it is active.
_UNPICKLING = threading.Lock()


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Turns an OSError for a path that cannot be read into a WeightsError."""
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"{source} cannot be read: {error.strerror}.", next_step="Check the path and its permissions."
        ) from None


def shapes_of(path: Path, *, prefix: str | None = None, split_axis: SplitAxis | None = None) -> Shapes:
    """Tensor names and shapes of the checkpoint at `path`; see `opened`."""
    with readable(str(path)):
        return opened(local(path), prefix=prefix, split_axis=split_axis)[0]


def opened(
    paths: tuple[Path, ...],
    *,
    prefix: str | None = None,
    wanted: Shapes = MappingProxyType({}),
    split_axis: SplitAxis | None = None,
) -> tuple[Shapes, Read]:
    """The shapes of the tensors in the files of one checkpoint, and a function that reads one as float32.

    wanted: the shapes of tensors that may be split over several files; split_axis: see `shards.merged`.
    prefix: select only tensors whose names begin with it and a dot; the prefix is removed from their names.
    """
    found, read = shards.merged({path: _open(path) for path in paths}, wanted, split_axis)
    shown = ", ".join(map(str, paths)) if len(paths) < 3 else str(paths[0].parent)
    if not found:
        raise WeightsError(f"{shown} holds no tensors.", next_step="Give a model's state dict.")
    unusable.check_names(found, shown)
    if prefix is None:
        return found, read
    start = f"{prefix}."
    inside = {name.removeprefix(start): shape for name, shape in found.items() if name.startswith(start)}
    if not inside:
        tops = sorted({name.partition(".")[0] for name in found})
        listed = ", ".join(tops[:8]) + (f" and {len(tops) - 8} more" if len(tops) > 8 else "")
        raise WeightsError(
            f"{shown} has no tensors under {prefix!r}.", next_step=f"At its top are {listed}; see --prefix."
        )
    return inside, lambda name: read(start + name)


def local(path: Path) -> tuple[Path, ...]:
    """The files of the checkpoint at `path`, a file or a folder of shards; raises WeightsError if there are none."""
    if path.is_dir():
        unusable.check_folder(path)
        for pattern in (
            "model*.safetensors",
            "*.safetensors",
            "consolidated.*.pth",
            "pytorch_model*.bin",
            "*.pth",
            "*.pt",
        ):
            if parts := tuple(sorted(file for file in path.glob(pattern) if file.is_file())):
                unusable.check_parts(path, parts)
                return parts
        if whole := sorted(path.glob("*.gguf")):
            raise WeightsError(
                f"{path} is a folder; a GGUF file is a whole checkpoint.",
                next_step=f"Give --weights {shlex.quote(str(whole[0]))}.",
            )
        raise WeightsError(
            f"{path} holds no .safetensors file and no other weight file.", next_step="Give the weights file itself."
        )
    if not path.is_file():
        raise WeightsError(
            f"There is no file {path}.", next_step="Check --weights, or leave it out for the published ones."
        )
    return (path,)


def _open(path: Path) -> tuple[Shapes, Read]:
    try:
        with untrusted.opened(path) as file:
            start = file.read(len(_ZIP_START))
    except Unreadable as error:
        raise WeightsError(error.message, next_step=error.next_step) from None
    if len(start) < len(_ZIP_START):
        raise WeightsError(f"{path} is truncated: it has {len(start)} bytes.", next_step="Get the file again.")
    if start == gguf_file.START:
        return gguf_file.open_gguf(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if start == _ZIP_START:
        return _open_zip(path)
    raise WeightsError(
        f"{path} is neither a .safetensors file nor the zip that torch.save writes since PyTorch 1.6.",
        next_step="Save its state dict again: torch.save(model.state_dict(), 'weights.pth').",
    )


def _open_safetensors(path: Path) -> tuple[Shapes, Read]:
    require("export", "safetensors")
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        plain = {part.get_dtype() for part in slices.values()} <= _NUMPY_READS.keys()
        places = _places(path) if plain else {}
    except OSError:
        raise
    except Exception as error:  # the package's own, or any for a file that was exchanged since it was checked
        raise WeightsError(
            f"{path} is truncated or no safetensors file ({error}).", next_step="Get the file again."
        ) from None
    if plain:
        return shapes, _reader(path, lambda: mapped_tensors.mapped(path, places), _widened)
    require("export", "torch")
    return shapes, _reader(path, lambda: safetensors.safe_open(path, framework="pt").get_tensor, _of_torch)


def _places(path: Path) -> Mapping[str, Stored]:
    """Where a safetensors file, whose header the package has checked, has the numbers of its tensors.

    The package does not give the offsets.
    """
    with path.open("rb") as file:
        (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
        header = json.loads(file.read(length))
    return {
        name: Stored(
            dtype=_NUMPY_READS[facts["dtype"]],
            shape=tuple(facts["shape"]),
            start=_HEADER_LENGTH.size + length + facts["data_offsets"][0],
        )
        for name, facts in header.items()
        if name != "__metadata__"
    }


def _open_zip(path: Path) -> tuple[Shapes, Read]:
    """The tensors of a `torch.save` file, mapped from disk; nested dicts become dotted names."""
    _check_zip(path)
    saved = torch_zip.content_of(path)
    if saved is not None and (stored := _plain(saved)) is not None:
        places: dict[str, Stored] = stored
        shapes = {name: tensor.shape for name, tensor in places.items()}
        return shapes, _reader(path, lambda: mapped_tensors.mapped(path, places), _widened)
    require("export", "torch")
    import torch

    foreign = _foreign_classes(path)
    unusable.check_classes(foreign, path)

    def tensors() -> dict[str, torch.Tensor]:
        with _inert(foreign):
            return _tensors(torch.load(path, map_location="cpu", mmap=True, weights_only=True), torch.Tensor)

    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    except Exception as error:  # a damaged or hostile pickle can make the unpickler raise anything
        # Torch's own message advises to load the file unsafely.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise WeightsError(
                f"{path} holds pickled objects besides tensors ({code[1]}); nothing of it was run.",
                next_step="Save only its state dict: torch.save(model.state_dict(), 'weights.pth').",
            ) from None
        raise WeightsError(
            f"{path} is damaged or no torch.save file ({_reason(error)}).", next_step="Get the file again."
        ) from None
    return shapes, _reader(path, lambda: tensors().__getitem__, _of_torch)


class _Inert:
    """Replaces a class in a pickle that is not a tensor: accepts all arguments and does nothing.

    The class itself is never imported, so its code does not run.
    """

    def __new__(cls, *_args: Any, **_named: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_named: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _value: Any) -> None:
        """As a list's."""

    extend = append


class _InertDict(_Inert):
    """The same for a class that is filled like a dict."""

    def __new__(cls, *_args: Any, **_named: Any) -> Any:
        return {}


def _foreign_classes(path: Path) -> tuple[str, ...]:
    """The names in the pickle that torch does not allow, found without unpickling; () if it is damaged."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return tuple(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # loading it reports what is wrong
        return ()


@contextmanager
def _inert(foreign: tuple[str, ...]) -> Iterator[None]:
    """Lets the unpickler skip those of `foreign` that are known settings and scalars; it refuses the others."""
    from torch.serialization import safe_globals

    stand_ins: list[Any] = [
        (_InertDict if _LIKE_DICT.search(name) else _Inert, name) for name in foreign if _INERT.match(name)
    ]
    with _UNPICKLING, safe_globals(stand_ins):
        yield


def _check_zip(path: Path) -> None:
    """Refuses a truncated file and a zip bomb: torch.save compresses nothing, so no entry may be compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises seven classes for damaged directories
        raise WeightsError(f"{path} is truncated or damaged ({error}).", next_step="Get the file again.") from None
    unusable.check_entries([entry.filename for entry in entries], path)
    size = path.stat().st_size
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise WeightsError(
            f"{path} is a compressed zip, which torch.save never writes; it was not unpacked.",
            next_step="Use the file as it was published.",
        )
    pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    try:
        if any(entry.file_size > pickle_check.MAX_BYTES for entry in pickles):
            raise ValueError("it is larger than any real one")
        with zipfile.ZipFile(path) as archive:
            for entry in pickles:
                pickle_check.check(archive.read(entry))
    except Exception as error:  # pickletools and zipfile raise half a dozen kinds for damaged files
        raise WeightsError(
            f"{path} is damaged or no torch.save file ({error}); nothing of it was run.",
            next_step="Save only its state dict: torch.save(model.state_dict(), 'weights.pth').",
        ) from None


def _plain(saved: Any) -> dict[str, Stored] | None:
    try:
        return _tensors(saved, Stored)
    except ValueError:
        return None  # torch says the same in the words that are known


def _tensors(content: Any, kind: type[_Kind]) -> dict[str, _Kind]:
    """The tensors in nested dicts by dotted name; a ValueError when the nesting does not end."""
    tensors: dict[str, _Kind] = {}
    level: list[tuple[str, Any]] = [("", content)]
    for _depth in range(_DICTS_DEEP_MAX):
        tensors |= {name: value for name, value in level if isinstance(value, kind)}
        inside = (
            (f"{name}.{key}" if name else str(key), value)
            for name, entries in level
            if isinstance(entries, Mapping)
            for key, value in entries.items()
        )
        level = list(islice(inside, _ENTRIES_MAX + 1))
        if not level:
            return tensors
        if len(level) > _ENTRIES_MAX:
            break
    raise ValueError(f"dicts more than {_DICTS_DEEP_MAX} deep or of more than {_ENTRIES_MAX} entries")


def _of_torch(tensor: torch.Tensor) -> Array | None:
    return tensor.detach().float().contiguous().numpy() if tensor.is_floating_point() else None


def _widened(array: Array) -> Array:
    import numpy as np

    with np.errstate(over="ignore"):  # what fp32 cannot hold is found as Inf
        return array.astype(np.float32, copy=False)


def _reader(path: Path, mapped: Callable[[], Callable[[str], Any]], as_float: Callable[[Any], Array | None]) -> Read:
    """Reads a tensor of `path` as float32; raises WeightsError for one that is quantised, sparse or without values.

    mapped: maps the file and returns a function that gets a tensor of it. as_float: its float32 numbers; None if it has
    others. The file is mapped again from time to time, because a page that was read counts as memory of this process
    while it is mapped: 4.5 GB for 1.1 billion weights. Two threads may read at once; it may then be mapped twice.
    """
    get, read_bytes = mapped(), 0

    def read(name: str) -> Array:
        nonlocal get, read_bytes
        try:
            if read_bytes > _MAPPED_BYTES_MAX:
                get, read_bytes = mapped(), 0
            tensor = get(name)
            read_bytes += tensor.nbytes
            array = as_float(tensor)
        except Exception as error:  # a dtype that the format has but NumPy does not
            raise WeightsError(
                f"The tensor {name} of {path} cannot be read ({_first_line(error)}).",
                next_step="Give plain float weights.",
            ) from None
        if array is None:
            raise WeightsError(
                f"The tensor {name} of {path} is {tensor.dtype}, not floating point.",
                next_step="Give unquantised weights.",
            )
        return array

    return read


def _reason(error: BaseException) -> str:
    """Torch's message without its advice."""
    said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return (
        "it holds objects that are neither tensors nor settings"
        if "weights_only" in said
        else _first_line(Exception(said))
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
