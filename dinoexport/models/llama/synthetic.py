"""Synthetic weights of a Llama-type decoder, the same on every machine.

Only (seed, tensor name) determine each value, through NumPy's frozen `RandomState`; all are exact in bfloat16 and
float16. Magnitudes are chosen so that every part has an effect: norms away from 1, attention neither uniform nor
one-hot, blocks that add as much to the residual stream as it holds, and a stream small enough for norm_eps to show.

Trained decoders also have massive activations, which noise does not have: in a few channels of the first tokens,
hundreds of times the median, made by one block's feed-forward (Sun et al. 2024, arXiv:2402.17762). `stressed` adds
them.
"""

from __future__ import annotations

import zlib

from dinoexport.models.llama.config import Architecture
from dinoexport.spec import Array

# Standard deviation of an embedding and of a block's contribution.
_STREAM = 0.05
# The marked token has this many times the others' deviation in one channel; the unit that finds it multiplies by it.
_MARK, _SLOPE = 60.0, 2.0
# The share of the peak in each massive channel; published ones differ in sign and size.
_SHARES = (1.0, -0.6, 0.3)
BOS = 1


def tensor(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """The tensor `name` of checkpoint `seed`, float32."""
    import numpy as np

    noise = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
    root = np.sqrt(shape[-1])
    if "norm" in name:
        values = 0.5 + 0.5 * np.abs(noise)
        values[::7] *= -1  # trained norms have a few of other sign
    elif name.startswith("tok_embeddings"):
        values = _STREAM * noise
    elif name.startswith("output"):
        values = 2.0 * noise / root
    elif name.endswith(("wq.weight", "wk.weight")):
        values = 1.3 * noise / root
    elif name.endswith("wo.weight"):
        values = 3.0 * _STREAM * noise / root
    elif name.endswith("w2.weight"):
        values = 1.5 * _STREAM * noise / root
    else:
        values = 1.5 * noise / root
    return _exact(values.astype(np.float32))


def stressed(name: str, shape: tuple[int, ...], seed: int, *, arch: Architecture, peak: float) -> Array:
    """`tensor`, changed so that from block layers/3 on the first token reaches `peak` times the stream's deviation.

    It does so in three channels, which hidden unit 0 of that block writes when it finds the mark of BOS.
    """
    import numpy as np

    values = tensor(name, shape, seed)
    chosen = np.random.RandomState(seed % 2**32).permutation(arch.dim)
    mark, massive, block = int(chosen[0]), chosen[1 : 1 + len(_SHARES)], f"layers.{arch.layers // 3}.feed_forward."
    if name == "tok_embeddings.weight":
        values[BOS, mark] = _MARK * _STREAM
    elif name in (f"{block}w1.weight", f"{block}w3.weight"):
        values[0] = 0
        values[0, mark] = _SLOPE
    elif name == f"{block}w2.weight":
        # The normed mark is about the root of dim times the norm's weight, which may have any sign.
        weight = float(tensor(f"layers.{arch.layers // 3}.ffn_norm.weight", (arch.dim,), seed)[mark])
        found = _SLOPE * weight * np.sqrt(arch.dim) * 0.9
        answer = found / (1 + np.exp(-found)) * found
        values[massive, 0] = peak * _STREAM * np.array(_SHARES) / answer
    return values


def prompt(vocabulary: int, length: int, seed: int, row: int = 0) -> Array:
    """A prompt of `length` token ids (T,), int64: BOS, then ids that are not special tokens."""
    import numpy as np

    generator = np.random.RandomState(zlib.crc32(f"{seed}:prompt:{length}:{row}".encode()))
    tokens = generator.randint(3, vocabulary, length)
    tokens[0] = BOS
    return tokens.astype(np.int64)


def _exact(values: Array) -> Array:
    """Rounded to bfloat16, to nearest even, and to zero where float16 would lose bits."""
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    out = rounded.view(np.float32)
    return np.where(np.abs(out) < 2.0**-17, np.float32(0), out)
