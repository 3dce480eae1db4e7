"""The uses of DINOv2's tokens in its model card, on one image at a time.

k-NN classification and retrieval by the class token (dinov2/eval/knn.py); linear classification on the class token and
the mean patch token (dinov2/eval/linear.py, create_linear_input); dense matching of patches between two images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dinoexport.images import Preprocessing
from dinoexport.models.dinov2.pictures import photograph
from dinoexport.spec import Array, Arrays, Picture

_THUMBNAIL_SIDE = 128  # pixels


@dataclass(frozen=True, kw_only=True)
class ImageUses:
    """Implements `dinoexport.family.Uses`."""

    preprocessing: Preprocessing
    neighbours_by: ClassVar = ("class_token",)
    classified_by: ClassVar = ("class_token", "mean_patch_token")

    def features(self, outputs: Arrays) -> dict[str, Array]:
        """The class token and the mean of the patch tokens, (D,) each, float32."""
        import numpy as np

        return {
            "class_token": outputs["class_token"][0].astype(np.float32),
            "mean_patch_token": outputs["patch_tokens"][0].mean(axis=0, dtype=np.float64).astype(np.float32),
        }

    def second_view(self, inputs: Arrays) -> dict[str, Array]:
        """The image mirrored left to right: of the same size, so within every profile that took the image."""
        import numpy as np

        width_axis = {"pixels": 3, "images": 2}
        return {name: np.ascontiguousarray(np.flip(array, width_axis[name])) for name, array in inputs.items()}

    def matches(self, outputs: Arrays, of_view: Arrays) -> Array:
        """For each patch (N,) the index of the mirrored image's patch that is nearest by cosine."""
        unit_ND, of_view_ND = (_unit(tokens["patch_tokens"][0]) for tokens in (outputs, of_view))
        nearest: Array = (unit_ND @ of_view_ND.T).argmax(axis=1)
        return nearest

    def thumbnail(self, inputs: Arrays) -> Picture:
        """The image as the model sees it, small."""
        ((pixels_CHW,),) = (
            self.preprocessing.normalised(array) if name == "images" else array for name, array in inputs.items()
        )
        return photograph(pixels_CHW, self.preprocessing, side_max=_THUMBNAIL_SIDE)


def _unit(tokens_ND: Array) -> Array:
    import numpy as np

    lengths = np.linalg.norm(tokens_ND, axis=1, keepdims=True)
    unit: Array = tokens_ND / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
