"""DINOv2's heads and Depth Anything V2 against numbers nobody here made: what the official code answers.

`data/goldens/heads` and `data/goldens/depth_anything` hold them, on checkpoints, heads and images that the rules in
`models/dinov2/synthetic.py` and `models/dinov2/heads/synthetic.py` make, seed 7. Each backbone runs once per image; the
heads share what it gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from dinoexport import family
from dinoexport.bundle import onnx_file
from dinoexport.config import recipe
from dinoexport.engines import builder, profiles
from dinoexport.errors import UsageError
from dinoexport.family import Call
from dinoexport.graph import onnx_writer
from dinoexport.graph import traces as kept
from dinoexport.graph.onnx_writer import export
from dinoexport.models.dinov2 import reference as of_backbone
from dinoexport.models.dinov2 import synthetic
from dinoexport.models.dinov2.heads import reference
from dinoexport.models.dinov2.heads.kinds import KINDS
from dinoexport.runtime import cpu
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor, Way
from dinoexport.validation.metrics import distance
from tests import conformance
from tests.conftest import DATA

SEED = 7
LIMIT = 1e-5
FILES = {"vits14": ("depth", "linear", "segmentation"), "vits14_reg": ("linear",)}
RELEASED = [kind for kind in KINDS if kind != "depth_anything" and not KINDS[kind].form.startswith("fitted")]
VARIANTS = [("vits14", kind) for kind in RELEASED] + [("vits14_reg", "linear"), ("vits14_reg", "linear4")]
DEPTH_ANYTHING = {"depth-anything-v2-vits": "vits", "depth-anything-v2-metric-hypersim-vits": "vits_metric20"}
Answer = Mapping[str, Any]


def model_of(variant: str, kind: str | None = None, **choices: Any) -> Any:
    loaded = recipe.load(variant if variant in recipe.variants() else str(DATA / f"{variant}.toml"))
    changed = loaded if kind is None else loaded.with_head(kind)
    return family.find("dinov2").model(changed.changed(**choices))


_READ: dict[tuple[str, str, str], Any] = {}


def reading(model: Any) -> Callable[[str], Any]:
    """Tensors of the synthetic checkpoint, each made once: twenty million random numbers take a second."""

    def read(name: str) -> Any:
        kind = model.recipe.head.get("kind", "") if "head." in name or "_head" in name else ""
        key = (kind, name, str(model.tensors[name]))
        if key not in _READ:
            _READ[key] = model.synthetic(name, SEED)
        return _READ[key]

    return read


def calls_of(model: Any) -> Sequence[Call]:
    (graph,) = model.graphs
    calls: Sequence[Call] = model.calls(graph, lambda name: pytest.fail(f"tracing read the weight {name}"))
    return calls


@functools.cache
def goldens(variant: str, kind: str) -> dict[str, dict[str, Any]]:
    """Size -> key -> the official numbers of one head."""
    if kind == "depth_anything":
        paths = [DATA / "goldens" / "depth_anything" / f"{DEPTH_ANYTHING[variant]}-seed{SEED}.npz"]
    else:
        paths = [DATA / "goldens" / "heads" / f"{variant}-{part}-seed{SEED}.npz" for part in FILES[variant]]
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        with np.load(path) as stored:
            for name in stored.files:
                of, _, rest = name.partition("/") if kind != "depth_anything" else (kind, "", name)
                if of == kind:
                    size, _, key = rest.partition("/")
                    found.setdefault(size, {})[key] = stored[name]
    assert found
    return found


def pixels(size: str) -> Any:
    return synthetic.pixels(*map(int, size.split("x")), SEED)


def errors(answer: Answer, golden: Mapping[str, Any]) -> dict[str, float]:
    """Relative L2 of every official number, and of labels the share of decided pixels that differ."""
    found = {}
    if "depth_every_7th" in golden:
        depth = answer["depth"]
        picked = {"every_7th": depth[:, 3::7, 3::7], "top_left": depth[:, :5, :5], "bottom_right": depth[:, -5:, -5:]}
        found = {k: distance(v, golden[f"depth_{k}"]).relative_l2 for k, v in picked.items()}
        found["mean"] = distance(depth.mean((1, 2), dtype=np.float64), golden["depth_mean"]).relative_l2
    elif "depth" in answer:
        at, depth = golden["pixels"], answer["depth"]
        found["depth"] = distance(depth[:, at[:, 0], at[:, 1]], golden["depth"]).relative_l2
        found["rows"] = distance(depth[:, :, depth.shape[2] // 2], golden["rows"]).relative_l2
        found["mean"] = distance(depth.mean((1, 2), dtype=np.float64), golden["mean"]).relative_l2
    elif "labels" in answer:
        if list(answer["patch_logits"].shape[2:]) != list(golden["raw_shape"][-2:]):
            return {"grid": float("inf")}
        at, labels = golden["raw_pixels"], answer["labels"]
        decided = np.unpackbits(golden["decided"])[: labels.size].astype(bool)
        assert labels.shape == golden["labels"].shape and labels.dtype == np.int32
        logits = np.moveaxis(answer["patch_logits"][:, :, at[:, 0], at[:, 1]], 1, -1)
        found["patch_logits"] = distance(logits, np.moveaxis(golden["raw"], 1, -1)).relative_l2
        found["labels"] = float((labels.ravel() != golden["labels"].ravel())[decided].mean())
    else:
        found["logits"] = distance(answer["logits"], golden["logits"]).relative_l2
    return found


def worst(answer: Answer, golden: Mapping[str, Any]) -> float:
    return max(errors(answer, golden).values())


def seen_as(image: torch.Tensor, seen: str) -> torch.Tensor:
    """What the backbone gets: the image as it is, padded around as the official code does, or one of two mistakes."""
    height, width = image.shape[-2:]
    match seen:
        case "padded around":
            return reference.padded(image)
        case "padded right and below":
            return F.pad(image, (0, -width % 14, 0, -height % 14))
        case "cropped":
            return image[..., : height // 14 * 14, : width // 14 * 14]
    return image


@functools.cache
def streams(variant: str, size: str, seen: str) -> dict[int, torch.Tensor]:
    """Block -> the residual stream of the official-shaped backbone, seed 7."""
    model = model_of(variant)
    backbone = getattr(model, "backbone", model)
    image = torch.from_numpy(pixels(size))
    kept: dict[int, torch.Tensor] = {}
    of_backbone.tokens_of(
        backbone.arch,
        lambda name: torch.from_numpy(reading(backbone)(name)),
        [seen_as(image, seen)],
        blocks=[],
        block_done=lambda _done: None,
        keep_stream=lambda _j, done, stream: kept.__setitem__(done - 1, stream),
    )
    return kept


def plain(variant: str, model: Any, size: str, **changed: Any) -> dict[str, Any]:
    """The plain formulation's answer; `changed` replaces what a mistake would."""
    head = changed.get("head", model.head)
    norm = tuple(torch.from_numpy(reading(model)(f"norm.{part}")) for part in ("weight", "bias"))
    load = changed.get("load", lambda name: torch.from_numpy(reading(model)(name)))
    kept = changed.get("streams") or streams(variant, size, "padded around" if head.pads else "as it is")
    image = changed.get("image", torch.from_numpy(pixels(size)))
    answer = reference.answers_of(head, load, kept, (norm[0], norm[1]), image)
    return {name: value.numpy() for name, value in answer.items()}


@pytest.mark.parametrize(("variant", "kind"), VARIANTS)
def test_official_numbers(variant: str, kind: str) -> None:
    model = model_of(variant, kind)
    for size, golden in goldens(variant, kind).items():
        assert worst(plain(variant, model, size), golden) <= LIMIT, size


@pytest.mark.parametrize("variant", DEPTH_ANYTHING)
def test_official_numbers_of_depth_anything(variant: str) -> None:
    model = model_of(variant)
    for size, golden in goldens(variant, "depth_anything").items():
        assert worst(plain(variant, model, size), golden) <= LIMIT, size


def several(models: Mapping[str, Any]) -> tuple[Graph, list[Call]]:
    """One graph of one backbone with several heads, each as it is behind a backbone of its own.

    What all share is traced, written and run once instead of once a head. Outputs are called KIND.OUTPUT.
    """
    calls: list[Call] = []
    outputs: list[Tensor] = []
    dims: tuple[Dim, ...] = ()
    for kind, model in models.items():
        (graph,) = model.graphs
        *body, head = model.calls(graph, reading(model))
        calls += body if not calls else ()
        calls.append(replace(head, scope=f"{kind}_head", outputs=tuple(f"{kind}.{name}" for name in head.outputs)))
        outputs += [replace(tensor, name=f"{kind}.{tensor.name}") for tensor in graph.outputs]
        dims = dims or graph.dims  # Depth Anything's are stricter than the classifiers' before it
    return replace(graph, outputs=tuple(outputs), dims=dims), calls


def only_our_operators(path: Path) -> None:
    """A bundle with an operator that is not in the list would be refused by every verb."""
    onnx_file.check(path, data_bytes=path.with_name(f"{path.name}.data").stat().st_size)


PADDED = tuple(kind for kind in RELEASED if KINDS[kind].form != "classifier")


@pytest.mark.parametrize(
    ("variant", "kinds"),
    [
        ("vits14", PADDED),
        ("vits14", ("linear", "linear4", *DEPTH_ANYTHING)),
        ("vits14_reg", ("linear", "linear4")),
    ],
    ids=["padded", "unpadded", "registers"],
)  # fmt: skip
def test_exported_heads_give_the_official_numbers(variant: str, kinds: Sequence[str], tmp_path: Path) -> None:
    """Every head at every size, its file run by both of a CPU's runtimes."""
    graph, calls = several({k: model_of(k) if k in DEPTH_ANYTHING else model_of(variant, k) for k in kinds})
    export(graph, calls, tmp_path, metadata={}, trace=functools.partial(onnx_writer.traced, trace=kept.of))
    only_our_operators(tmp_path / "model.onnx")
    answering = {}
    for runtime in ("onnxruntime", "openvino"):
        way = Way(runtime=runtime, precision=Precision.FP32)
        (answering[runtime],) = cpu.open_graphs({tmp_path / "model.onnx": graph}, way).values()
    official = {
        kind: goldens(*((kind, "depth_anything") if kind in DEPTH_ANYTHING else (variant, kind))) for kind in kinds
    }
    compared = 0
    for size in sorted({size for of_kind in official.values() for size in of_kind}):
        inputs = {"pixels": pixels(size)}
        for name, ask in answering.items():
            answers = ask(inputs)
            for kind in (kind for kind in kinds if size in official[kind]):
                own = {n.partition(".")[2]: array for n, array in answers.items() if n.startswith(f"{kind}.")}
                golden = official[kind][size]
                assert worst(own, golden) <= LIMIT, (kind, name, size, errors(own, golden))
                compared += 1
    assert compared == 2 * sum(map(len, official.values()))


TINY: dict[str, dict[str, Any]] = {
    "linear4": {},
    "nyu_linear4": {},
    "nyu_dpt": {},
    "ade20k_ms": {},
    "probe": {"classes": ("cat", "dog", "owl")},
    "knn": {"classes": ("cat", "dog", "owl"), "bank": 12, "neighbours": 5, "temperature": 0.07},
}


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    """Pieces that were traced once: all heads share stem and block."""
    return {}


@pytest.mark.parametrize("kind", TINY)
def test_conformance(kind: str, tmp_path: Path, traces: dict[str, Any]) -> None:
    """The kit every family passes, with each form of head on a four-block backbone."""
    model = model_of("tiny_heads", head={"kind": kind, **TINY[kind]})
    # The smaller first: most of the kit's questions are answered by it.
    cases = [
        model.case({"name": "off", "why": "no multiple of 14", "height": 24, "width": 31}, DATA),
        model.case({"name": "odd", "why": "odd counts of patches", "batch": 2, "height": 42, "width": 70}, DATA),
    ]
    whole = kind == "linear4"
    conformance.check(model, cases, tmp_path, traces=traces, changing=None if whole else model.head.tensors)


def test_every_form_of_head_compiles(tmp_path: Path, traces: dict[str, Any]) -> None:
    """All behind one backbone, so that NVIDIA's compiler starts once: it takes every resize, and fuses every block.

    The graph's body is fp16; its heads, as `--precision auto` may keep them, are the pieces that were traced above.
    """
    reduced = {"precision": Precision.FP16, "graph": {"residual": "fp32", "fp32": ["head"]}}
    graph, calls = several(
        {kind: model_of("tiny_heads", head={"kind": kind, **TINY[kind]}, **reduced) for kind in TINY}
    )
    path = export(graph, calls, tmp_path, metadata={}, traces=traces).onnx
    only_our_operators(path)
    made = builder.build(
        path, graph, tmp_path, runtime=Runtime.TENSORRT_RTX, profiles=[profiles.profile("whole", graph, {})],
        compute_capabilities=("8.0",),
    )  # fmt: skip
    # Classifiers end in a softmax and k-NN weighs votes by one; neither is a block's attention.
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert sum(node.op_type == "Softmax" for node in nodes) > 4
    assert (made.fused_attentions, made.attentions) == (4, 4)


def test_no_head_of_any_variant_has_other_pieces() -> None:
    """What the two tests above check holds for all variants: their graphs are made of the same traced modules."""
    checked = {
        call.piece.code for kind in TINY for call in calls_of(model_of("tiny_heads", head={"kind": kind, **TINY[kind]}))
    }
    checked |= {call.piece.code for name in DEPTH_ANYTHING for call in calls_of(model_of(name))}
    found: set[str] = set()
    for name in recipe.variants():
        loaded = recipe.load(name)
        if loaded.family == "dinov2":
            for kind in loaded.heads or [None]:
                for precision in (Precision.FP32, Precision.FP16, Precision.BF16):
                    found |= {call.piece.code for call in calls_of(model_of(name, kind, precision=precision))}
    assert found <= checked and len(found) > 6


def mistaken(  # noqa: C901 (a table of mistakes)
    variant: str, kind: str, size: str, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The plain formulation's answer with one mistake in it."""
    model = model_of(variant, kind)
    head = model.head
    image = torch.from_numpy(pixels(size))
    read = reading(model)
    changed: dict[str, Any] = {}
    if mistake == "other norm":
        monkeypatch.setattr(type(head), "after_norm", not head.after_norm)
    elif mistake == "last blocks":
        monkeypatch.setattr(type(head), "blocks", tuple(range(head.arch.depth - 4, head.arch.depth)))
    elif mistake == "hub's range":
        monkeypatch.setattr(type(head), "depth_range", (0.001, 80.0))
    elif mistake in ("mean dropped", "variance dropped"):
        name = f"decode_head.bn.running_{mistake.split(maxsplit=1)[0].replace('variance', 'var')}"
        value = torch.zeros(head.width) if "mean" in mistake else torch.ones(head.width)
        changed["load"] = lambda n: value if n == name else torch.from_numpy(read(n))
    elif mistake == "no class token":
        kept = {block: stream.clone() for block, stream in streams(variant, size, "padded around").items()}
        for stream in kept.values():
            stream[:, 0] = 0
        changed["streams"] = kept
    elif mistake in ("all corners", "no corners"):
        resize = F.interpolate
        corners = mistake == "all corners"
        monkeypatch.setattr(F, "interpolate", lambda x, **k: resize(x, **(k | {"align_corners": corners})))
    elif mistake == "clamp last":
        clamp = torch.Tensor.clamp
        monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *a, **k: x)
        answer = plain(variant, model, size)
        monkeypatch.undo()
        return answer | {"depth": clamp(torch.from_numpy(answer["depth"]), *head.depth_range).numpy()}
    elif mistake == "no clamp":
        monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *a, **k: x)
    elif mistake == "padding cut away":
        answer = plain(variant, model, size, image=reference.padded(image))
        (rows, columns), (height, width) = (-side % 14 // 2 for side in image.shape[-2:]), image.shape[-2:]
        return {
            name: array[:, rows : rows + height, columns : columns + width] if name in ("depth", "labels") else array
            for name, array in answer.items()
        }
    else:
        changed["streams"] = streams(variant, size, mistake)
        if mistake == "cropped":
            monkeypatch.setattr(type(head), "pads", False)
    return plain(variant, model, size, **changed)


# The heads whose losses by each mistake were measured with the official code.
TABLE = ("nyu_linear", "nyu_linear4", "nyu_dpt", "ade20k_linear", "voc2012_ms")


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        *((kind, "other norm") for kind in TABLE),
        *((kind, "cropped") for kind in TABLE),
        *((kind, "padded right and below") for kind in TABLE),
        *((kind, "padding cut away") for kind in TABLE),
        *((kind, "last blocks") for kind in ("nyu_linear4", "nyu_dpt")),
        *((kind, "hub's range") for kind in ("nyu_linear", "nyu_linear4")),
        *((kind, f"{what} dropped") for kind in ("ade20k_linear", "voc2012_ms") for what in ("mean", "variance")),
        *(("nyu_dpt", mistake) for mistake in ("all corners", "no corners", "no class token")),
        *(("kitti_dpt", mistake) for mistake in ("clamp last", "no clamp")),
    ],
)
def test_official_numbers_catch_mistakes(kind: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each known mistake costs at 225x300 is far past the limit, which the first test above holds there."""
    size = "1x225x300"
    assert worst(mistaken("vits14", kind, size, mistake, monkeypatch), goldens("vits14", kind)[size]) > 100 * LIMIT


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (2, 5, 8, 11)), (24, (4, 11, 17, 23)), (40, (9, 19, 29, 39)), (4, (0, 1, 2, 3))]
)
def test_blocks_of_the_spread_heads(depth: int, blocks: tuple[int, ...]) -> None:
    variant = {12: "vitb14", 24: "vitl14", 40: "vitg14", 4: "tiny_heads"}[depth]
    assert model_of(variant, "nyu_dpt").head.blocks == blocks
    assert model_of(variant, "ade20k_ms").head.blocks == tuple(range(depth - 4, depth))


def test_a_register_variant_has_no_depth_head() -> None:
    with pytest.raises(UsageError, match="no nyu_dpt head was trained for a backbone with registers"):
        model_of("vitb14_reg", "nyu_dpt")


@pytest.mark.parametrize(
    ("variant", "kind", "words"),
    [
        ("vits14", "upside_down", r"there is no head 'upside_down'\. There are linear, linear4, nyu_linear"),
        ("vits14", "nyu_dtp", r"Did you mean 'nyu_dpt'\?"),
        ("vits14", "logreg", "needs classes; dinoexport fit makes such a head from images"),
        ("depth-anything-v2-vits", "nyu_dpt", "depth-anything-v2-vits has its own head, depth_anything, and takes no"),
    ],
)
def test_a_head_that_cannot_be_is_refused_in_words(variant: str, kind: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        model_of(variant, kind)
    assert "Value error" not in refused.value.message


def test_hugging_faces_depth_anything_agrees_at_518() -> None:
    """A second oracle, and the key map of its layout: the published names go in, its own numbers come out."""
    import transformers

    backbone = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14,
        out_indices=[3, 6, 9, 12], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    theirs = transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=384, neck_hidden_sizes=[48, 96, 192, 384],
            fusion_hidden_size=64, head_hidden_size=32,
        )
    ).eval()  # fmt: skip
    model = model_of("depth-anything-v2-vits")
    state = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    asked: list[str] = []

    def spy(name: str) -> Any:
        asked.append(name)
        return theirs.state_dict()[name].float().numpy()

    shapes, read = model.adapt(state, spy)
    assert {n: s for n, s in shapes.items() if n not in model.optional_tensors} == {
        n: s for n, s in model.tensors.items() if n not in model.optional_tensors
    }
    image = pixels("1x518x518")
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(image)).predicted_depth.numpy()
    (ours,) = conformance.reference(model, read, [{"pixels": image}])
    assert expected.std() > 0 and distance(ours["depth"], expected).relative_l2 <= LIMIT


@pytest.mark.parametrize(
    ("variant", "kind", "words"),
    [
        ("vits14", "ade20k_ms", "is padded around"),
        ("vits14", "linear", "is cropped to"),
        ("depth-anything-v2-vits", None, "must be multiples of 14"),
    ],
)
def test_the_card_says_what_the_graph_does_with_other_sizes(variant: str, kind: str | None, words: str) -> None:
    card = model_of(variant, kind).card
    assert words in card["limits"] and ("LVD" in card["model"]) == (kind is not None)
