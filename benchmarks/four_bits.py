"""What four bits cost a real decoder, by how its weights are rounded: `python -m benchmarks.four_bits GGUF`.

PyTorch computes SmolLM2's logits with weights that were rounded and widened again, the output matrix in eight bits, and
compares them with those of the weights as they are. The file's weights are in four bits already, in blocks of 32.
So they are rounded twice: as they lie, and with the inputs of each product in another order, where no block is one of
the file's, as if they had never been in four bits. Weights of errors are mean squares of inputs over other texts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoexport.config import recipe
from dinoexport.family import find
from dinoexport.graph.quantised_weights import symmetric, with_offset
from dinoexport.models.llama import gguf_tokenizer, reference
from dinoexport.models.llama.config import Architecture
from dinoexport.spec import silent
from dinoexport.text import tokenizer
from dinoexport.validation import metrics
from dinoexport.weights.checkpoint import open_checkpoint

ROOT = Path(__file__).parent.parent
BLOCK = 32
SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)
# Positions per text that are compared; the texts are the cases of the validation, and the longest is cut.
KEEP, LONGEST = 240, 300
# Rows of a weight that are rounded at a time.
ROWS_AT_A_TIME = 1024
CALIBRATION = ("LICENSE", "dinoexport/spec.py")
ALL, NO_VALUES = ("output",), ("output", "wv", "w2")
Rounding = Callable[[Tensor, Tensor], Tensor]


def grid(*, zero: str, shrinks: Sequence[float], weighted: bool = False) -> Rounding:
    """Blocks (N, B, O) to the nearest of 16 levels: around zero, with a whole zero point, or from any offset."""

    def rounded(blocks: Tensor, weights: Tensor) -> Tensor:
        least, most = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        low, high = (-8, 7) if zero == "none" else (0, 15)
        if zero == "none":
            whole = torch.maximum(most / high, least / low)
        else:
            if zero == "whole":
                least, most = least.clamp(max=0), most.clamp(min=0)
            whole = (most - least) / 15
        best, found = torch.full_like(least, float("inf")), torch.zeros_like(blocks)
        for shrink in shrinks:
            step = (whole * shrink).clamp(min=1e-30)
            start = least + (most - least) * (1 - shrink) / 2
            point = {"none": 0 * step, "whole": (-least / whole).round().clamp(0, 15), "any": -start / step}[zero]
            tried = ((blocks / step + point).round().clamp(low, high) - point) * step
            error = (tried - blocks).square()
            total = (error * weights if weighted else error).sum(1, keepdim=True)
            best, found = torch.minimum(best, total), torch.where(total < best, tried, found)
        return found

    return rounded


def built(blocks: Tensor, _weights: Tensor) -> Tensor:
    """As an int4 graph has them."""
    codes, scale, offset = with_offset(blocks)
    return codes * scale.unsqueeze(1) + offset.unsqueeze(1)


def in_eight(blocks: Tensor, _weights: Tensor) -> Tensor:
    """As an int8 graph has them."""
    codes, scale, _ = symmetric(blocks, 8)
    return codes * scale.unsqueeze(1)


# What a row is called, its rounding, what stays in eight bits, and bytes per weight in four with numbers in fp16.
ROWS: tuple[tuple[str, Rounding, tuple[str, ...], float], ...] = (
    ("nearest, around zero", grid(zero="none", shrinks=(1.0,)), ALL, 0.5625),
    ("searched, around zero", grid(zero="none", shrinks=SHRINKS), ALL, 0.5625),
    ("nearest, zero point", grid(zero="whole", shrinks=(1.0,)), ALL, 0.578),
    ("searched, zero point", grid(zero="whole", shrinks=SHRINKS), ALL, 0.578),
    ("searched and weighted, zero point", grid(zero="whole", shrinks=SHRINKS, weighted=True), ALL, 0.578),
    ("nearest, offset", grid(zero="any", shrinks=(1.0,)), ALL, 0.625),
    ("searched and fitted, offset: what is built", built, ALL, 0.625),
    ("the same, values and down projections in eight bits", built, NO_VALUES, 0.625),
    ("searched and weighted, offset", grid(zero="any", shrinks=SHRINKS, weighted=True), ALL, 0.625),
)


HEADER = """# What four bits cost a decoder

`python -m benchmarks.four_bits GGUF`: logits of SmolLM2-135M at {positions} positions, computed by PyTorch in fp32 with
weights that were rounded to four bits in blocks of 32 and widened again, against those of the weights as they are. The
output matrix is in eight bits. "As in the file": the blocks are those of the GGUF file, whose weights are in four bits
already. "Shuffled": the inputs of each product are in another order, so that no block was in four bits before.
Bytes are those of a weight with its numbers in fp16. Nothing here is timed.

| blocks | rounding | bytes | relative L2 | KL mean | KL worst | likeliest kept | widest gap |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "four_bits.md")
    asked = parser.parse_args()
    loaded = recipe.load("smollm2-135m")
    model = find(loaded.family).model(loaded)
    read = open_checkpoint(model, loaded, str(asked.weights), progress=silent).read
    weights = {name: torch.from_numpy(np.ascontiguousarray(read(name))) for name in model.tensors}
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    arch = Architecture.model_validate(loaded.model).model_copy(update={"tied": False})
    texts = [
        torch.tensor(ids[:LONGEST])
        for name in ("long", "prose", "chat")
        for ids in json.loads((ROOT / "validate" / f"smollm2_{name}.json").read_text())
    ]

    def logits(tensors: dict[str, Tensor], prompts: Sequence[Tensor]) -> Tensor:
        rows = reference.logits_of(
            arch,
            tensors.__getitem__,
            prompts,
            first_positions=[0] * len(prompts),
            keep=[min(KEEP, len(prompt) - 1) for prompt in prompts],
            block_done=lambda _: None,
        )
        return torch.cat(rows)

    squares = of_inputs(weights, lambda: logits(weights, calibration(asked.weights)))
    wanted = logits(weights, texts).numpy()
    lines = []
    for shuffled, rows in ((True, ROWS), (False, ROWS[::3])):
        for label, rounding, eight, size in rows:
            changed = {
                name: rounded(weights[name], in_eight if name.split(".")[-2] in eight else rounding, square, shuffled)
                for name, square in squares.items()
            }
            found = logits(weights | changed, texts).numpy()
            far = metrics.distance(metrics.centred(found), metrics.centred(wanted)).relative_l2
            apart = metrics.divergence(found, wanted)
            blocks = "shuffled" if shuffled else "as in the file"
            lines.append(
                f"| {blocks} | {label} | {size} | {far:.2g} | {apart.kl_mean:.2g} "
                f"| {apart.kl_worst:.2g} | {apart.top1_kept:.1%} | {apart.top1_gap:.1f} |"
            )
            print(lines[-1], flush=True)
            header = HEADER.format(positions=len(wanted))
            asked.out.write_text(header + "\n".join(lines) + "\n")


def calibration(weights: Path) -> list[Tensor]:
    """Ids of two texts that are not compared."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / tokenizer.JSON
        path.write_bytes(gguf_tokenizer.read(weights)[tokenizer.JSON])
        encode = tokenizer.load(path).encode
    return [torch.tensor(encode((ROOT / name).read_text())[:LONGEST]) for name in CALIBRATION]


def of_inputs(weights: dict[str, Tensor], run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Product's weight -> mean squares (I,) of its inputs in `run`."""
    names = {id(values): name for name, values in weights.items()}
    found: dict[str, Tensor] = {}
    linear = F.linear

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        name = names[id(weight)]
        found[name] = found.get(name, torch.zeros(())) + x.flatten(0, -2).square().mean(0)
        return linear(x, weight)

    F.linear = watched
    try:
        run()
    finally:
        F.linear = linear
    return found


def rounded(weight_OI: Tensor, rounding: Rounding, square_I: Tensor, shuffled: bool) -> Tensor:
    """The weight, rounded in blocks of inputs in their order or another; in parts, so that they stay in the cache."""
    order = torch.randperm(len(square_I), generator=torch.Generator().manual_seed(1))
    order = order if shuffled else torch.arange(len(square_I))
    shares = square_I[order].reshape(-1, BLOCK, 1)
    made = torch.empty_like(weight_OI)
    for begin in range(0, len(weight_OI), ROWS_AT_A_TIME):
        part = weight_OI[begin : begin + ROWS_AT_A_TIME, order].T.reshape(
            -1, BLOCK, min(ROWS_AT_A_TIME, len(weight_OI) - begin)
        )
        made[begin : begin + ROWS_AT_A_TIME, order] = rounding(part, shares).reshape(len(square_I), -1).T
    return made


if __name__ == "__main__":
    main()
