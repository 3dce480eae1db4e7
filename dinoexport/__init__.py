"""dinoexport: a PyTorch checkpoint becomes a bundle that is proven to give PyTorch's outputs.

    bundle = dinoexport.build("vits14", weights="synthetic:0")     # or dinoexport.load("bundles/vits14-fp32-cpu")
    tokens = bundle(["photograph.jpg"])

`dinoexport.errors` has the exceptions; every one has a `next_step`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoexport.api import Bundle, OutputsDiffer, build, load

__all__ = ["Bundle", "OutputsDiffer", "__version__", "build", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads the API when one of its names is first used: `import dinoexport` costs nothing."""
    if name in __all__:
        from dinoexport import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
