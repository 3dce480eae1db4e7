"""`python -m dinoexport` is the `dinoexport` command; both begin here, before anything that takes time is loaded."""

from __future__ import annotations

from typing import NoReturn

from dinoexport.system import interrupts


def main() -> NoReturn:
    """The console entry point."""
    interrupts.leave_at_once()
    from dinoexport.cli import main as run
    from dinoexport.cli.streams import three_descriptors

    three_descriptors()
    run()


if __name__ == "__main__":
    main()
