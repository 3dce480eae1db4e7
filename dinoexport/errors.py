"""Every error a user can meet: one tree, each with what to do next and the exit code it ends in.

Programming mistakes of our own stay `assert` and `TypeError`; they are not part of this tree.
"""

from __future__ import annotations

from importlib.util import find_spec


class DinoexportError(Exception):
    """An error with one clear sentence and, in `next_step`, what the user can do about it."""

    exit_code = 5

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step


class ValidationFailed(DinoexportError):
    """The candidate's numbers are not the reference's, or a bundle's bytes are not the manifest's."""

    exit_code = 1


class UsageError(DinoexportError):
    """The command line, a recipe or a validation file asks for something that cannot be."""

    exit_code = 2


class InputRefused(UsageError):
    """The model's inputs are outside what its graph promises to take."""


class OutsideProfile(InputRefused):
    """The graph would take these inputs; no profile of its engine covers them."""


class WeightsError(DinoexportError):
    """The checkpoint is absent, damaged, hostile, or not the variant that was asked for."""

    exit_code = 3


class MissingRequirement(DinoexportError):
    """This machine lacks a package, a network, a disk or a device the work needs."""

    exit_code = 4


class BuildError(DinoexportError):
    """A stage of the build broke; nothing was published."""

    exit_code = 5


def missing_package(package: str, extra: str) -> MissingRequirement:
    """The one sentence for a heavy package that belongs to an extra which is not installed."""
    return MissingRequirement(
        f"{package} is not installed, and this step needs it.",
        next_step=f"pip install 'dinoexport[{extra}]'",
    )


def require(extra: str, *packages: str) -> None:
    """Raises `missing_package` for the first of `packages`, which `extra` brings, that is not installed."""
    for package in packages:
        try:
            found = find_spec(package) is not None
        except ValueError:  # what find_spec says of a module that was put out of action
            found = False
        if not found:
            raise missing_package(package, extra)
