"""Labelled images as examples: a class for each subfolder, a share held out, no image in both shares.

Only an image's bytes decide whether it is held out. Adding an image therefore moves no other image to the other share,
and files with the same bytes are always in the same share.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dinoexport.errors import UsageError
from dinoexport.family import CaseSource
from dinoexport.spec import Progress, silent
from dinoexport.system import files, untrusted

HELD_OUT = 0.2  # of each class, and of every class at least one image
_IMBALANCE = 10  # times the smallest class; from this ratio on it is reported as imbalance
_NAMED_MAX = 8


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One image. name: its path below the folder. digest: the SHA-256 of its file."""

    name: str
    label: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Examples:
    """All usable images of a folder in two shares. said: notes for the user about them."""

    classes: tuple[str, ...]
    fitted: tuple[LabelledImage, ...]
    held_out: tuple[LabelledImage, ...]
    said: tuple[str, ...]

    @property
    def digest(self) -> str:
        """One hash over every image's path, bytes and share."""
        lines = [
            f"{share} {example.digest} {example.name}\n"
            for share, examples in (("fitted", self.fitted), ("held out", self.held_out))
            for example in examples
        ]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def check_folder(folder: Path) -> None:
    """Raises UsageError for what no image needs to be read to see: there is no folder, or fewer than two in it."""
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.", next_step="Give a folder with a subfolder for each class.")
    if len(labels := _subfolders(folder)) < 2:
        _refuse_few(folder, sorted(labels))


def read(model: CaseSource, folder: Path, *, seed: int, progress: Progress = silent) -> Examples:
    """The images of `folder`, in two shares.

    Raises UsageError for a folder with one class, for classes that cannot be split, for images in no class, and for one
    image in two classes; each names what is wrong.
    """
    check_folder(folder)
    found: list[LabelledImage] = []
    skipped: list[str] = []
    for case in model.cases_from(folder, progress=progress):
        if isinstance(case, str):
            skipped.append(case.removeprefix(f"{folder}{os.sep}"))  # the notes are part of the bundle
            continue
        digest = files.sha256(folder / untrusted.check_name(case.name))  # which its class is a part of
        found.append(LabelledImage(name=case.name, label=case.label, digest=digest))
    if outside := [example.name for example in found if not example.label]:
        raise UsageError(
            f"{listed(outside)} of {folder} are in no subfolder, so they have no class.",
            next_step="Put each image into the folder of its class.",
        )
    classes = tuple(sorted({example.label for example in found}))
    if len(classes) < 2:
        _refuse_few(folder, classes)
    _refuse_two_labels(found)
    fitted, held_out = split(found, seed=seed)
    refuse_leak(fitted, held_out)
    said = [f"skipped: {line}" for line in skipped]
    if empty := sorted(_subfolders(folder) - set(classes)):
        said.append(f"{listed(empty)}: a folder without an image that can be read is no class of the new bundle")
    counts = Counter(example.label for example in found)
    most, least = max(counts, key=lambda k: (counts[k], k)), min(counts, key=lambda k: (counts[k], k))
    if counts[most] >= _IMBALANCE * counts[least]:
        said.append(
            f"classes are imbalanced: {most} has {counts[most]} images, {least} has {counts[least]}; "
            "--balanced gives them the same weight"
        )
    if copies := len(found) - len({example.digest for example in found}):
        files_are = "1 file is a copy of another" if copies == 1 else f"{copies} files are copies of others"
        said.append(f"{files_are}; copies are on the same side of the split")
    return Examples(classes=classes, fitted=tuple(fitted), held_out=tuple(held_out), said=tuple(said))


def _subfolders(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}


def _refuse_few(folder: Path, classes: Sequence[str]) -> NoReturn:
    had = f"one class, {classes[0]!r}" if classes else "no image that can be read in a subfolder"
    raise UsageError(f"{folder} has {had}.", next_step="A classifier needs at least two subfolders of images.")


def split(examples: Sequence[LabelledImage], *, seed: int) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """(fitted, held out) by class; raises UsageError that names the classes with one image."""
    by_class: dict[str, dict[str, list[LabelledImage]]] = defaultdict(lambda: defaultdict(list))
    for example in examples:
        by_class[example.label][example.digest].append(example)
    if single := sorted(label for label, groups in by_class.items() if len(groups) < 2):
        raise UsageError(
            f"{listed(single)}: a class with one image cannot be both fitted and held out.",
            next_step="Add images, or leave the class out.",
        )
    fitted: list[LabelledImage] = []
    held_out: list[LabelledImage] = []
    for label in sorted(by_class):
        groups = by_class[label]
        shuffled = sorted(groups, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        count = max(1, round(HELD_OUT * len(shuffled)))
        for i, digest in enumerate(shuffled):
            (held_out if i < count else fitted).extend(groups[digest])
    return fitted, held_out


def refuse_leak(fitted: Sequence[LabelledImage], held_out: Sequence[LabelledImage]) -> None:
    """Raises UsageError if an image is in both shares: accuracy on fitted images says nothing about new images."""
    both = {example.digest for example in fitted} & {example.digest for example in held_out}
    if both:
        names = sorted(example.name for example in held_out if example.digest in both)
        raise UsageError(
            f"{listed(names)} are both held out and fitted: the accuracy would be too high.",
            next_step="Remove the copies.",
        )


def _refuse_two_labels(examples: Sequence[LabelledImage]) -> None:
    labels: dict[str, dict[str, str]] = defaultdict(dict)
    for example in examples:
        labels[example.digest].setdefault(example.label, example.name)
    if wrong := [" and ".join(sorted(names.values())) for names in labels.values() if len(names) > 1]:
        raise UsageError(
            f"One image in two classes: {listed(sorted(wrong))}.", next_step="Keep it only in its own class."
        )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:_NAMED_MAX])
    return shown if len(names) <= _NAMED_MAX else f"{shown} and {len(names) - _NAMED_MAX} more"
