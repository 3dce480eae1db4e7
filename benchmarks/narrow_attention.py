"""What attention in eight bits would cost in accuracy: `python -m benchmarks.narrow_attention [VARIANT]`.

Linear layers are int8 already. Attention's two products, queries by keys and probabilities by values, are computed here
by PyTorch with their operands rounded to int8 or fp8 (e4m3), everything else in fp32. No kernel is timed: what is shown
is whether the limits of int8 (`validate/dinov2.toml`) would leave room for one. The tokens are judged against PyTorch's
own fp32 on photographs, with plain weights and with massive activations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.static_int8 import photographs, pixels
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Precision, silent
from dinoexport.validation.metrics import distance
from dinoexport.weights.checkpoint import open_checkpoint

SIDES = (224, 518)
WEIGHTS = ("synthetic:0", "synthetic-stress:0")
Round = Callable[[Tensor, tuple[int, ...]], Tensor]
WHOLE, PER_TOKEN, PER_CHANNEL = (1, 2, 3), (3,), (2,)


def exact(x: Tensor, _dims: tuple[int, ...]) -> Tensor:
    """No rounding."""
    return x


def int8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Symmetric, with one scale for all values along `dims`."""
    scale = x.abs().amax(dim=dims, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def fp8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """e4m3, whose largest number is 448, with one scale for all values along `dims`."""
    scale = x.abs().amax(dim=dims, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def attention(scores: Round, mix: Round, *, per_tensor: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of (B, heads, N, width) with the operands of its products rounded.

    per_tensor: one scale for all of q, k or v, as a kernel with constant scales has; else one per token (q, k) or per
    channel (v). Probabilities have one scale for a row.
    """
    of_qk, of_v = (WHOLE, WHOLE) if per_tensor else (PER_TOKEN, PER_CHANNEL)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        products = scores(q * q.shape[-1] ** -0.5, of_qk) @ scores(k, of_qk).transpose(-2, -1)
        return mix(products.softmax(dim=-1), PER_TOKEN) @ mix(v, of_v)

    return attend


FORMS = {
    "int8 scores": attention(int8, exact, per_tensor=False),
    "int8 scores, a scale per tensor": attention(int8, exact, per_tensor=True),
    "int8 both products": attention(int8, int8, per_tensor=False),
    "int8 both products, a scale per tensor": attention(int8, int8, per_tensor=True),
    "fp8 scores": attention(fp8, exact, per_tensor=False),
    "fp8 both products": attention(fp8, fp8, per_tensor=False),
}


def main(variant: str) -> None:
    """Prints a Markdown table: the worst of all photographs and outputs."""
    print("| weights | side | attention | relative L2 | worst token |\n| --- | --- | --- | --- | --- |")
    for weights in WEIGHTS:
        request = pipeline.build_request(variant, weights=weights, precision=Precision.FP32)
        read = open_checkpoint(request.model, request.recipe, request.weights, progress=silent).read
        for side in SIDES:
            inputs = [{"pixels": pixels(image, side)} for image in photographs()]

            tokens = partial(request.model.reference, read, inputs, precision=Precision.FP32, progress=silent)
            expected = list(tokens())
            for name, form in FORMS.items():
                with patch.object(F, "scaled_dot_product_attention", form):
                    found = list(tokens())
                apart = [
                    distance(ours[output], theirs[output])
                    for ours, theirs in zip(found, expected, strict=True)
                    for output in theirs
                ]
                l2, worst = (max(getattr(each, figure) for each in apart) for figure in ("relative_l2", "worst_l2"))
                print(f"| {weights} | {side} | {name} | {l2:.4f} | {worst:.4f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", nargs="?", default="vits14")
    main(parser.parse_args().variant)
