"""All user-facing exceptions: one tree, each with a next step and an exit code.

Programming errors stay `assert` and `TypeError`; they are not part of this tree.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

# USER:PASSWORD@ of an address, also of one that cannot be parsed; an image's digest follows an @ too. And its query, in
# which signed addresses have their key.
_CREDENTIALS = re.compile(r"(?P<scheme>://)(?:[^\s/@:]*:\S*|[^\s/]*)@|(?<![\w/.])[^\s'\"@:/]+:(?!//)\S+@(?!sha256:)")
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")


class DinoexportError(Exception):
    """An error: one sentence and, in `next_step`, what the user can do. Credentials in an address are left out."""

    exit_code = 5

    def __init__(self, message: str, *, next_step: str = "") -> None:
        self.message = without_credentials(message)
        self.next_step = without_credentials(next_step)
        super().__init__(self.message)


class ValidationFailed(DinoexportError):
    """The candidate's outputs are not the reference's, or a bundle's bytes are not the manifest's."""

    exit_code = 1


class UsageError(DinoexportError):
    """The command line, a recipe or a validation file asks for something impossible."""

    exit_code = 2


class InputRefused(UsageError):
    """The inputs are not ones that the graph takes."""


class OutsideProfile(InputRefused):
    """The graph takes these inputs, but no profile of its engine covers them."""


class WeightsError(DinoexportError):
    """The checkpoint is missing, damaged, malicious, or another variant than the requested one."""

    exit_code = 3


class MissingRequirement(DinoexportError):
    """This machine lacks a package, a network, disk space or a device that the work needs."""

    exit_code = 4


class BuildError(DinoexportError):
    """A stage of the build failed; nothing was published."""

    exit_code = 5


def without_credentials(text: str) -> str:
    """The text with `...` for the user, password and query of every address in it, so that no log keeps them."""
    if "@" in text:
        text = _CREDENTIALS.sub(lambda found: f"{found['scheme'] or ''}...@", text)
    return _QUERY.sub(r"\1?...", text) if "://" in text else text


def missing_package(package: str, extra: str) -> MissingRequirement:
    """The error for a package of an extra that is not installed."""
    return MissingRequirement(
        f"{package} is not installed, and this step needs it.",
        next_step=f"pip install 'dinoexport[{extra}]'",
    )


def require(extra: str, *packages: str) -> None:
    """Raises `missing_package` for the first of `packages` that is not installed; `extra` installs them."""
    for package in packages:
        try:
            found = find_spec(package) is not None
        except ValueError:  # find_spec raises it for a module that was disabled
            found = False
        if not found:
            raise missing_package(package, extra)
