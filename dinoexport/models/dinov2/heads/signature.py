"""The outputs of a graph with a head, with meanings and units, and the facts that users must know about the head."""

from __future__ import annotations

from dinoexport.models.dinov2.heads.kinds import Head
from dinoexport.spec import HeadFacts, Tensor


def facts(head: Head) -> HeadFacts:
    """The head's dataset, terms of use, range and classes."""
    ranges = {"linear_depth": head.table.depth_range or head.kind.dataset.depth_range}
    ranges |= {"dpt_depth": ranges["linear_depth"]}
    greatest = head.table.max_depth
    return HeadFacts(
        kind=head.table.kind,
        dataset=head.kind.dataset.name,
        terms=head.kind.dataset.terms,
        value_range=ranges.get(head.form) or (None if greatest is None else (0.0, greatest)),
        classes=head.class_names,
    )


def outputs(head: Head) -> tuple[Tensor, ...]:
    """The head's outputs, with units."""
    count, names = head.class_count, head.kind.dataset.name
    probabilities = Tensor(
        name="probabilities",
        dtype="float32",
        shape=("batch", count),
        meaning=f"probability of each class of {names}; they sum to one",
        kind="probabilities",
    )
    match head.form:
        case "classifier":
            logits = Tensor(
                name="logits", dtype="float32", shape=("batch", count), meaning=f"logits of the classes of {names}"
            )
            return logits, probabilities
        case "fitted_linear" | "fitted_knn":
            index = Tensor(
                name="class_index",
                dtype="int32",
                shape=("batch",),
                meaning="index of the most probable class",
                kind="labels",
                decided_by="probabilities",
            )
            return probabilities, index
        case "segmentation":
            labels = Tensor(
                name="labels",
                dtype="int32",
                shape=("batch", "height", "width"),
                meaning=f"class of each pixel, of {names}",
                kind="labels",
                decided_by="patch_logits",
            )
            logits = Tensor(
                name="patch_logits",
                dtype="float32",
                shape=("batch", count, "patch_rows", "patch_columns"),
                meaning="logits of each class for each patch of the padded image, before they are resized to pixels",
                kind="maps",
            )
            return labels, logits
        case "linear_depth" | "dpt_depth":
            low, high = head.depth_range
            meaning = f"depth of each pixel, metres, {low:g} to {high:g}"
        case "depth_anything":
            greatest = head.table.max_depth
            meaning = (
                "relative inverse depth of each pixel, no unit: larger is nearer"
                if greatest is None
                else f"depth of each pixel, metres, 0 to {greatest:g}"
            )
    return (Tensor(name="depth", dtype="float32", shape=("batch", "height", "width"), meaning=meaning, kind="depth"),)


def card(head: Head) -> dict[str, str]:
    """The dataset, its terms of use, the depth range and the source of that range."""
    said = {
        "head": f"{head.table.kind}, trained on {head.kind.dataset.name}",
        "head_terms": head.kind.dataset.terms,
    }
    if head.form in ("linear_depth", "dpt_depth"):
        low, high = head.depth_range
        chosen = "the recipe's" if head.table.depth_range else "the dataset's; no weight file states it"
        said["depth_range"] = f"{low:g} to {high:g} m ({chosen})"
    if head.table.max_depth is not None:
        said["depth_range"] = f"0 to {head.table.max_depth:g} m"
    return said


def depth_anything_card(name: str) -> dict[str, str]:
    """What a published model of Depth Anything V2 is; its backbone began as DINOv2 and was trained further.

    Yang et al. 2024 (arXiv:2406.09414); bias is not stated there.
    """
    return {
        "model": f"{name}: a DINOv2 backbone and a DPT head, trained together",
        "intended_use": "depth of each pixel of one photograph",
        "limits": "Both sides of an image must be multiples of 14.",
        "bias": "not stated by the authors",
    }
