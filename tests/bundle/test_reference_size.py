"""How large a reference is, from the cases and the signature of each variant: written for real, with nothing asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinoexport import bundle
from dinoexport.bundle import reference_file
from dinoexport.bundle.reference_file import Reference
from dinoexport.models.dinov2.published import PATCH
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.request import BuildRequest
from dinoexport.spec import Array, Case, Expectation, Precision

# MB by width: a user copies a bundle to each machine it serves on, and the reference must not outweigh the model.
BOUNDS_MB = {384: 30, 768: 40, 1024: 50, 1536: 65}
VARIANTS = [f"vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")]


def answers(request: BuildRequest, case: Case) -> dict[str, Array]:
    """Zeros of the shapes that the graph's signature gives for this case."""
    (pixels_B3HW,) = case.inputs.values()
    batch, _, height, width = pixels_B3HW.shape
    sizes = {"batch": batch, "patches": (height // PATCH) * (width // PATCH)}
    return {
        tensor.name: np.zeros([sizes[n] if isinstance(n, str) else n for n in tensor.shape], np.float32)
        for tensor in request.model.graphs[0].outputs
    }


def size_bytes(request: BuildRequest, path: Path) -> int:
    expectations = []
    for case in request.cases:
        outputs = answers(request, case)
        own = {name: array.astype(np.float16) for name, array in outputs.items()} if case.shown else {}
        expectations.append(
            Expectation(case=case, outputs=outputs, own_outputs=own, own_error=dict.fromkeys(outputs, 1e-3))
        )
    reference_file.write(
        path, Reference(name="x" * 80, limits=request.limits, expectations=tuple(expectations), refusals=())
    )
    return path.stat().st_size


@pytest.mark.parametrize("variant", VARIANTS)
def test_references_stay_compact(variant: str, tmp_path: Path) -> None:
    """In fp16, where PyTorch's own answers to the photographs are carried too."""
    request = pipeline.build_request(variant, precision=Precision.FP16)
    width = int(request.model.facts["width"])
    assert size_bytes(request, tmp_path / "reference.npz") < BOUNDS_MB[width] * 1e6


def test_a_real_one_has_the_size_that_was_reckoned(tmp_path: Path) -> None:
    from tests.report.test_html_report import recipe_with_photographs

    recipe = recipe_with_photographs(tmp_path)
    request = pipeline.build_request(recipe, weights="synthetic:0", precision=Precision.FP16, out=tmp_path / "bundle")
    pipeline.build(request)
    real = (request.out / bundle.REFERENCE).stat().st_size
    assert size_bytes(request, tmp_path / "reckoned.npz") == pytest.approx(real, rel=1e-3)
