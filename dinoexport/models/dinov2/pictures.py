"""Pictures for the report: a photograph, its patch tokens as colours, and where a candidate's tokens differ.

The colours are the first three principal components of the patch tokens, as the DINOv2 paper shows them (Oquab et al.
2023, arXiv:2304.07193, figure 1), without its separation of the foreground. PyTorch's tokens of a case choose the basis
and the range of the colours, so equal tokens have equal colours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO

from dinoexport.images import Preprocessing
from dinoexport.spec import Array, Picture
from dinoexport.validation.metrics import vector_cosines

_PHOTOGRAPH_SIDE_MAX = 448  # pixels: enough beside a map of 32 patches
# Viridis at nine positions (van der Walt and Smith 2015, CC0): perceptually uniform, also in print.
_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37),
)  # fmt: skip


def of_case(
    pixels_BCHW: Array,
    reference_BND: Array,
    candidates_BND: Mapping[str, Array],
    *,
    patch: int,
    preprocessing: Preprocessing,
) -> tuple[tuple[Picture, ...], ...]:
    """A row for each image: itself, PyTorch's patch tokens, then each candidate's and its error per patch.

    The errors of one image share a scale, so that candidates can be compared.
    """
    import numpy as np

    h, w = (side // patch for side in pixels_BCHW.shape[2:])
    project = _colours(reference_BND)
    rows = []
    for i, pixels_CHW in enumerate(pixels_BCHW):
        row = [photograph(pixels_CHW[:, : h * patch, : w * patch], preprocessing)]
        row.append(_map(project(reference_BND[i]).reshape(h, w, 3), "PyTorch", "three principal components as colours"))
        errors = {name: 1 - vector_cosines(ours[i], reference_BND[i]) for name, ours in candidates_BND.items()}
        largest = max((float(e[np.isfinite(e)].max(initial=0.0)) for e in errors.values()), default=0.0)
        for name, tokens_BND in candidates_BND.items():
            row.append(_map(project(tokens_BND[i]).reshape(h, w, 3), name, "the same components"))
            row.append(_heat(errors[name].reshape(h, w), largest, name))
        rows.append(tuple(row))
    return tuple(rows)


def _colours(reference_BND: Array) -> Callable[[Array], Array]:
    """The projection of tokens (N, D) to bytes (N, 3) that the reference's tokens choose."""
    import numpy as np

    tokens_ND = reference_BND.reshape(-1, reference_BND.shape[-1]).astype(np.float64)
    mean_D = tokens_ND.mean(axis=0)
    centred_ND = tokens_ND - mean_D
    _, vectors_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    basis_D3 = vectors_DD[:, :-4:-1]
    # An eigenvector's sign is arbitrary; its largest entry decides it, so that all machines draw the same colours.
    largest_3 = np.abs(basis_D3).argmax(axis=0)
    basis_D3 = basis_D3 * np.sign(basis_D3[largest_3, np.arange(basis_D3.shape[1])])
    low_3, high_3 = np.percentile(centred_ND @ basis_D3, (1, 99), axis=0)

    def project(tokens_ND: Array) -> Array:
        scaled = ((tokens_ND.astype(np.float64) - mean_D) @ basis_D3 - low_3) / np.maximum(high_3 - low_3, 1e-12)
        return _bytes(255 * scaled)

    return project


def photograph(pixels_CHW: Array, preprocessing: Preprocessing, *, side_max: int = _PHOTOGRAPH_SIDE_MAX) -> Picture:
    """Normalised pixels as an image: a JPEG of at most `side_max` pixels a side."""
    from PIL import Image

    image = Image.fromarray(_bytes(255 * preprocessing.shown(pixels_CHW)))
    image.thumbnail((side_max, side_max))
    stored = BytesIO()
    image.save(stored, "JPEG", quality=85)
    caption = f"{pixels_CHW.shape[1]} x {pixels_CHW.shape[2]} pixels, as the model sees it"
    return Picture(title="Photograph", caption=caption, data=stored.getvalue(), media_type="image/jpeg")


def viridis(values: Array) -> Array:
    """Values 0 to 1, of any shape, as bytes of three channels: dark to bright."""
    import numpy as np

    places = values * (len(_VIRIDIS) - 1)
    colours = np.stack(
        [np.interp(places, np.arange(len(_VIRIDIS)), channel) for channel in zip(*_VIRIDIS, strict=True)], axis=-1
    )
    return _bytes(colours)


def _heat(errors_hw: Array, largest: float, name: str) -> Picture:
    import numpy as np

    finite = errors_hw[np.isfinite(errors_hw)]
    colours = viridis(np.nan_to_num(errors_hw, nan=largest) / max(largest, 1e-300))
    caption = f"of {name}: dark 0, bright {largest:.1e}, worst {finite.max(initial=0.0):.1e}"
    if finite.size < errors_hw.size:
        caption += f"; {errors_hw.size - finite.size} patches are not finite"
    return _map(colours, "Cosine error", caption)


def _map(colours_hw3: Array, title: str, caption: str) -> Picture:
    """A pixel for each patch; the page enlarges it without smoothing."""
    import numpy as np
    from PIL import Image

    stored = BytesIO()
    Image.fromarray(np.ascontiguousarray(colours_hw3)).save(stored, "PNG")
    return Picture(title=title, caption=caption, data=stored.getvalue(), media_type="image/png")


def _bytes(values: Array) -> Array:
    import numpy as np

    whole: Array = np.clip(np.rint(np.nan_to_num(values)), 0, 255)
    return whole.astype(np.uint8)
