"""One photograph through every head: `make gallery`, or `python -m scripts.gallery --help`.

Writes build/gallery/gallery.md and its pictures; the page in docs is made with `--out docs`. Each head is exported and
its graph answers in ONNX Runtime. With the published weights the pictures show depth and labels; with synthetic ones
only that each graph answers for every pixel, as the page says.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from dinoexport import images
from dinoexport.config import resources
from dinoexport.errors import DinoexportError
from dinoexport.graph import onnx_writer, traces
from dinoexport.graph.onnx_writer import export
from dinoexport.models.dinov2.heads import pictures
from dinoexport.models.dinov2.heads.kinds import KINDS
from dinoexport.pipeline import build as pipeline
from dinoexport.pipeline.stages.weights import open_weights
from dinoexport.runtime import ort
from dinoexport.spec import Array, silent

OUT = Path("build/gallery")
DOCS = Path(__file__).parent.parent / "docs"
HEADS = tuple(kind for kind in KINDS if not KINDS[kind].form.startswith("fitted") and kind != "depth_anything")
DEPTH_ANYTHING = ("depth-anything-v2-vits", "depth-anything-v2-metric-hypersim-vits")
_WIDTH = 300  # pixels of a picture


def answers(variant: str, head: str | None, weights: str | None, photograph: bytes) -> Any:
    """(model, what its exported graph answers of the photograph). weights: None for the published ones."""
    synthetic = weights is not None and weights.startswith("synthetic")
    # What a folder of files has of the head is named as published.
    request = pipeline.build_request(
        variant, weights=weights, head=head, head_weights=weights if synthetic and head else None, target="cpu"
    )
    model = request.model
    checkpoint = open_weights(request, silent)
    (graph,) = model.graphs
    (end,) = (end for end in model.front_ends(None, progress=silent) if end.name == "images")
    inputs = model.prepare(end.name, end.settings, [photograph])
    trace = partial(onnx_writer.traced, trace=traces.of)
    with tempfile.TemporaryDirectory() as folder:
        export(graph, model.calls(graph, checkpoint.read), Path(folder), metadata={}, trace=trace)
        return model, ort.open_graph(Path(folder) / f"{graph.name}.onnx", graph)(inputs)


def saved(out: Path, name: str, colours_HW3: Array) -> str:
    """The picture in `out`/images, with a palette of 64 colours; its Markdown."""
    from PIL import Image

    image = Image.fromarray(colours_HW3)
    image.thumbnail((_WIDTH, _WIDTH), Image.Resampling.NEAREST)
    image.quantize(64, method=Image.Quantize.MEDIANCUT).save(out / "images" / f"gallery_{name}.png", optimize=True)
    return f"![{name.replace('_', ' ')}](images/gallery_{name}.png)"


def shown(out: Path, name: str, model: Any, answer: Any) -> str:
    """One head's answer as a row of the page's table."""
    import numpy as np

    head = model.head
    if "depth" in answer:
        depth = answer["depth"][0]
        low, high = (float(end) for end in np.percentile(depth, (2, 98)))
        ends = f"dark {low:.3g}, bright {high:.3g}{head.depth_unit}"
        return f"{saved(out, name, pictures.depth_image(depth, low, high))} | {ends}"
    if "labels" in answer:
        labels = answer["labels"][0]
        found, counts = np.unique(labels, return_counts=True)
        most = found[np.argsort(-counts, kind="stable")][:4]
        legend = ", ".join(f"{head.class_names[k]} {counts[found == k][0] / labels.size:.0%}" for k in most)
        return f"{saved(out, name, pictures.label_image(labels, head.class_count))} | {legend}"
    best = np.argsort(-answer["probabilities"][0], kind="stable")[:4]
    named = (f"{head.class_names[k].split(',')[0]} {answer['probabilities'][0][k]:.1%}" for k in best)
    return "the most probable classes | " + ", ".join(named)


def page(given: argparse.Namespace, photograph: bytes) -> str:
    """Asks every chosen head, one after the other, and returns the page in Markdown."""
    import numpy as np

    lines = []
    of_backbone = [(kind, given.variant, kind) for kind in HEADS]
    every = (*of_backbone, *((variant, variant, None) for variant in DEPTH_ANYTHING))
    for name, variant, head in every:
        if given.head and name not in given.head:
            continue
        model, answer = answers(variant, head, given.weights, photograph)
        lines.append(f"| `{name}` | {shown(given.out, name.replace('-', '_'), model, answer)} |")
        print(lines[-1], flush=True)
    own = saved(given.out, "photograph", np.asarray(images.decode(photograph, named="the photograph")))
    made = "the published weights" if given.weights is None else f"synthetic weights (`{given.weights}`)"
    said = "" if given.weights is None else (
        " Synthetic weights know nothing of photographs: the pictures show that each graph answers for every pixel, "
        "and not what the head has learnt."
    )  # fmt: skip
    return (
        f"""# Gallery: one photograph through every head

{own}

Made with {made} of `{given.variant}` and Depth Anything V2, by ONNX Runtime from the exported graphs.{said}

Make it with the published weights, which are downloaded, and with your own photograph; the page is
`build/gallery/gallery.md`:

```sh
make gallery                         # or, for another photograph, backbone and two heads alone:
python -m scripts.gallery --variant vitb14 --image photograph.jpg --head nyu_linear --head ade20k_ms
```

| head | answer | |
| --- | --- | --- |
"""
        + "\n".join(lines)
        + "\n\nThe heads, and how their answers are compared with PyTorch's: "
        + f"[Depth, segmentation and classes]({os.path.relpath(DOCS / 'heads.md', given.out)}).\n"
    )


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="vits14", help="the backbone of the released heads")
    parser.add_argument(
        "--head",
        action="append",
        choices=(*HEADS, *DEPTH_ANYTHING),
        help="one of the heads, repeatable; by default all of them. DPT heads take longest",
    )
    parser.add_argument("--weights", default=None, help="synthetic:SEED; by default the published files are downloaded")
    parser.add_argument("--image", type=Path, default=None, help="a photograph; by default a shipped one")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where gallery.md and its pictures go; by default {OUT}")
    given = parser.parse_args()
    path = given.image or resources.folder("validate") / "images" / "coffee.png"
    try:
        images.load(path)  # before any export
        (given.out / "images").mkdir(parents=True, exist_ok=True)
        text = page(given, path.read_bytes())
    except DinoexportError as error:
        raise SystemExit(f"{error.message} {error.next_step}") from None
    (given.out / "gallery.md").write_text(text, encoding="utf-8")
    print(f"Gallery: {given.out / 'gallery.md'}")


if __name__ == "__main__":
    main()
