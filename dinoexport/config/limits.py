"""Validations: limits for each precision with their reasons, and cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from dinoexport.config import resources
from dinoexport.config.recipe import Frozen, parse, read_toml
from dinoexport.errors import UsageError
from dinoexport.spec import Precision, closest


class Limit(Frozen):
    """A limit, and the reason for its value."""

    # An infinite limit would limit nothing.
    value: float = Field(allow_inf_nan=False)
    reason: str = Field(min_length=20)


class Limits(Frozen):
    """The limits for a candidate of one precision, per output and per case.

    kl_mean_max to top1_gap_max: for outputs that are distributions, see `metrics.divergence`; their relative errors are
    those of centred logits, and cosines are not meaningful. neighbour_agreement_min: for cases whose neighbours are
    meaningful, see `metrics.neighbour_agreement`. knn_agreement_min to correspondence_min: over all of a user's own
    files together, see `agreement`. probability_difference_max: of any one probability, instead of the figures of
    vectors. depth_within_min: the share of depths within 1.25 times PyTorch's. label_agreement_min: the share of all
    pixels that have PyTorch's label; where PyTorch's label is clear, all must have it.
    """

    relative_l2_max: Limit
    worst_l2_max: Limit
    cosine_mean_min: Limit | None = None
    cosine_p01_min: Limit | None = None
    cosine_worst_min: Limit | None = None
    kl_mean_max: Limit | None = None
    kl_worst_max: Limit | None = None
    top1_kept_min: Limit | None = None
    top1_gap_max: Limit | None = None
    times_own_error_max: Limit | None = None
    neighbour_agreement_min: Limit | None = None
    knn_agreement_min: Limit | None = None
    recall_min: Limit | None = None
    probe_agreement_min: Limit | None = None
    correspondence_min: Limit | None = None
    probability_difference_max: Limit | None = None
    depth_within_min: Limit | None = None
    label_agreement_min: Limit | None = None


class Validation(Frozen):
    """Limits per precision, and cases in the family's own terms."""

    limits: dict[Precision, Limits]
    cases: tuple[dict[str, Any], ...] = Field(min_length=1)


def load_validation(name: str, *, beside: Path | None) -> tuple[Validation, Path]:
    """The validation file `name` and its folder: the folder of the user's recipe, else the shipped one."""
    folders = [folder for folder in (beside, resources.folder("validate")) if folder is not None]
    for folder in folders:
        path = folder / f"{name}.toml"
        if path.is_file():
            return parse(Validation, read_toml(path), where=str(path)), folder
    near = closest(name, [path.stem for folder in folders for path in sorted(folder.glob("*.toml"))])
    raise UsageError(
        f"There is no validation {name!r}: looked for {name}.toml in {', '.join(map(str, folders))}.{near}",
        next_step="Put the file beside your recipe, or name a shipped one.",
    )
