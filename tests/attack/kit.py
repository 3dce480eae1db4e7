"""What an attack spoils, made once: a tiny bundle, its recipe, weights in every format, images, a pair of keys."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from dinoexport.family import find
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Runtime
from tests.attack.hostile import Kit
from tests.conftest import DATA

CASES = """
[limits.fp32]
relative_l2_max = { value = 1e-3, reason = "an attack asks nothing of accuracy" }
worst_l2_max = { value = 1e-2, reason = "an attack asks nothing of accuracy" }

[[cases]]
name = "one"
why = "the smallest image there is"
height = 28
width = 42
"""


def narrow_recipe(folder: Path) -> Path:
    """A recipe of one block, 32 wide, whose build takes a second."""
    text = (DATA / "tiny_swiglu.toml").read_text()
    for old, new in (
        ("embed_dim = 96", "embed_dim = 32"),
        ("num_heads = 3", "num_heads = 2"),
        ("depth = 3", "depth = 1"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "attack_cases.toml").write_text(CASES)
    path = folder / "narrow.toml"
    path.write_text(text.replace('validation = "tiny_cases"', 'validation = "attack_cases"'))
    return path


def make(folder: Path) -> Kit:
    """Everything, in `folder`. What runs a network does so in a new process: this one will be forked.

    Not in a fork of this one either: PyTorch's threads, where a test has used them, do not live on in a fork.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    recipe = narrow_recipe(folder)
    built = folder / "bundle"
    if not built.exists():
        code = "import sys, pathlib, tests.attack.kit as k; k.build_bundle(*map(pathlib.Path, sys.argv[1:]))"
        subprocess.run([sys.executable, "-c", code, recipe, built, folder], cwd=DATA.parents[1], check=True)
    images = folder / "images"
    for i, (name, mode) in enumerate((("a/1.png", "RGB"), ("a/2.jpg", "RGB"), ("b/3.png", "L"), ("b/4.bmp", "RGB"))):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(i).randint(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(images / name)
    key = folder / "sign.pem"
    if not key.exists():
        for words in (
            ("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)),
            ("ec", "-in", str(key), "-pubout", "-out", str(folder / "verify.pem")),
        ):
            subprocess.run(["openssl", *words], check=True, capture_output=True)
    weights = tuple(folder / f"weights.{suffix}" for suffix in ("safetensors", "pth", "gguf"))
    return Kit(bundle=built, recipe=recipe, weights=weights, images=images, key=key)


def build_bundle(recipe: Path, built: Path, folder: Path) -> None:
    """The bundle, and its weights in every format."""
    import gguf
    import safetensors.numpy
    import torch

    request = pipeline.build_request(
        str(recipe), weights="synthetic:0", out=built, target="cpu", runtime=Runtime.ONNXRUNTIME
    )
    pipeline.build(request)
    model = find("dinov2").model(request.recipe)
    tensors = {name: np.array(model.synthetic(name, 0)) for name in model.tensors}
    safetensors.numpy.save_file(tensors, folder / "weights.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / "weights.pth")
    writer = gguf.GGUFWriter(folder / "weights.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "b"])
    for name, array in list(tensors.items())[:8]:
        writer.add_tensor(name, np.ascontiguousarray(array.reshape(array.shape[-1], -1) if array.ndim > 4 else array))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def small_bundle(folder: Path, tiny: Path) -> Path:
    """A bundle of the same kind that is small enough to be signed a hundred times."""
    copy = folder / "small" / "bundle"
    if not copy.exists():
        shutil.copytree(tiny, copy)
    return copy
