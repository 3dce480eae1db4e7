"""Recognise files that look like usable weights but are not, and say what each is and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from dinoexport.errors import WeightsError
from dinoexport.system import untrusted

_STATE_DICT = "torch.save(model.state_dict(), 'weights.pth')"
_SHARDED = (
    "Give a whole one: upstream's training writes eval/training_N/teacher_checkpoint.pth; others gather it with "
    "FullStateDictConfig and save that."
)
_MERGE = "Merge it first: model.merge_and_unload().save_pretrained(FOLDER), then give that folder."
_FLAT = re.compile(r"(^|\.)_?flat_param(_\d+)?$")
_ADAPTER = re.compile(
    r"(^|\.)(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|ia3_l|oft_r|hada_w1_a|lokr_w1)(\.|$)"
)
_QUANTISED = re.compile(
    r"(^|\.)(SCB|weight_format|qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|weight_scale|weight_zero_point|"
    r"_packed_params(\._packed_params)?|quant_state\.\w+|scb)$"
)
# The name of one part, as transformers numbers them, and more bytes than an index of them has.
_PART = re.compile(r"(?P<start>.+-)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.\w+)")
_INDEX_MAX_BYTES = 1 << 26


def check_names(names: Iterable[str], shown: str) -> None:
    """Refuses tensors whose names show that they are parts of ranks, an adapter, or quantised."""
    for name in names:
        if _FLAT.search(name):
            raise WeightsError(f"{shown} is one rank's part of a model sharded by FSDP ({name}).", next_step=_SHARDED)
        if _ADAPTER.search(name):
            raise WeightsError(f"{shown} holds a LoRA or other adapter that is not merged ({name}).", next_step=_MERGE)
        if _QUANTISED.search(name):
            raise WeightsError(
                f"{shown} is quantised ({name}).",
                next_step="Give the weights it was quantised from; dinoexport quantises with --precision int8.",
            )


def check_classes(classes: Collection[str], path: Path) -> None:
    """Refuses a pickle of whole modules, of sharded or of quantised tensors, by the classes it names."""
    for name in sorted(classes):
        if name.startswith(("torch.distributed.", "torch.distributed_c10d")):
            raise WeightsError(f"{path} is one rank's part of a model sharded by FSDP ({name}).", next_step=_SHARDED)
        if name.startswith(
            ("torchao.", "torch.ao.", "bitsandbytes.", "optimum.quanto", "torch._utils._rebuild_qtensor")
        ):
            raise WeightsError(f"{path} is quantised ({name}).", next_step="Give the weights it was quantised from.")
    if modules := [name for name in sorted(classes) if name.startswith("torch.nn.modules.")]:
        raise WeightsError(
            f"{path} is a whole pickled module ({modules[0]}), which only its own code could open; nothing of it was "
            "run.",
            next_step=f"Open it where it was made, and save its tensors: {_STATE_DICT}",
        )


def check_entries(entries: Collection[str], path: Path) -> None:
    """Refuses the zip of a TorchScript program and of torch.export, by the names in it."""
    parts = [entry.partition("/")[2] for entry in entries]
    if any(part == "constants.pkl" or part.startswith("code/") for part in parts):
        raise WeightsError(
            f"{path} is a TorchScript program, not a state dict.",
            next_step="Save its tensors: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
        )
    if any(part.startswith("models/") and part.endswith(".json") for part in parts):
        raise WeightsError(
            f"{path} is a program of torch.export, not a state dict.",
            next_step="Save its tensors: torch.save(torch.export.load(FILE).state_dict, 'weights.pth')",
        )


def check_folder(folder: Path) -> None:
    """Refuses a folder with a distributed checkpoint, or with an adapter but no model."""
    if any(folder.glob("*.distcp")):
        raise WeightsError(
            f"{folder} is a distributed checkpoint, a part for each rank.",
            next_step="Join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth",
        )
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors")):
        raise WeightsError(f"{folder} holds an adapter without its model.", next_step=_MERGE)


def check_parts(folder: Path, files: Collection[Path]) -> None:
    """Refuses some of a checkpoint's numbered files without the others, by their names and by the index beside them."""
    there = {file.name for file in files}
    wanted: set[str] = set()
    for name in there:
        if (part := _PART.fullmatch(name)) is not None:
            wanted |= {f"{part['start']}{i + 1:05d}-of-{part['count']}{part['end']}" for i in range(int(part["count"]))}
    for index in sorted(folder.glob("*.index.json")):
        try:
            listed = json.loads(untrusted.read_bytes(index, max_bytes=_INDEX_MAX_BYTES))["weight_map"].values()
            named = {name for name in listed if isinstance(name, str)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, untrusted.Unreadable):
            continue  # the tensors themselves show what is there
        wanted |= named if named & there else set()
    if missing := sorted(wanted - there):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(
            f"{folder} lacks {missing[0]}{others} of its checkpoint.", next_step="Give all files of the checkpoint."
        )
