"""Every fact that the files beside weights of DINOv2 state, read from files written here: no library, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dinoexport.errors import UsageError
from dinoexport.models.dinov2 import beside

HALF = [0.5, 0.5, 0.5]


def said(folder: Path, **files: dict[str, Any]) -> dict[str, Any]:
    """The facts of a folder with these files; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        ending = "yaml" if name == "training" else "json"
        (folder / f"{name.replace('training', 'config')}.{ending}").write_text(json.dumps(content))
    found = beside.facts(folder)
    assert all(fact.source for fact in found)
    return {fact.key.replace("preprocess.", "").replace("model.", ""): fact.value for fact in found}


HUGGING_FACE = {
    "model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "patch_size": 14,
    "num_channels": 4, "layer_norm_eps": 1e-3, "qkv_bias": False, "use_swiglu_ffn": False, "image_size": 230,
    "hidden_act": "gelu", "mlp_ratio": 2.5,
}  # fmt: skip
STATED = {
    "embed_dim": 48, "depth": 2, "num_heads": 6, "patch_size": 14, "in_chans": 4, "layer_norm_eps": 1e-3,
    "qkv_bias": False, "register_count": 0, "feed_forward": "mlp", "position_side": 16, "activation": "gelu",
    "mlp_hidden": 120,
}  # fmt: skip


def without(stated: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in stated.items() if key not in names}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, STATED),
        ({"use_swiglu_ffn": True}, without(STATED, "activation", "mlp_hidden") | {"feed_forward": "swiglu"}),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": 4}, STATED | {"register_count": 4}),
        ({"model_type": "dinov2_with_registers"}, without(STATED, "register_count")),
        ({"num_register_tokens": 4}, STATED),
        ({"image_size": None}, without(STATED, "position_side")),
        ({"patch_size": None}, without(STATED, "position_side", "patch_size")),
        ({"hidden_size": None}, without(STATED, "embed_dim", "mlp_hidden")),
        ({"mlp_ratio": None}, without(STATED, "mlp_hidden")),
        ({"hidden_act": None}, without(STATED, "activation")),
        ({"hidden_act": "gelu_pytorch_tanh"}, STATED | {"activation": "gelu_tanh"}),
        ({"use_swiglu_ffn": None}, without(STATED, "feed_forward")),
    ],
)
def test_a_configuration_of_hugging_face(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert said(tmp_path, config=HUGGING_FACE | changes) == expected


@pytest.mark.parametrize("key", ["backbone_config", "vision_config"])
def test_a_configuration_within_a_larger_models(key: str, tmp_path: Path) -> None:
    assert said(tmp_path, config={"model_type": "depth_anything", key: HUGGING_FACE}) == STATED


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {}, {"vision_config": {"model_type": "clip"}}])
def test_configurations_of_others_say_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    assert said(tmp_path, config=config, preprocessor_config={"image_mean": HALF}) == {}


PROCESSOR = {
    "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "size": {"shortest_edge": 300},
    "crop_size": {"height": 280, "width": 280},
}  # fmt: skip
PREPARED = {
    "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "resize": 300, "crop": 280,
}  # fmt: skip


def scaled(times: float) -> dict[str, Any]:
    return {key: tuple(value * times for value in PREPARED[key]) for key in ("mean", "std")}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"rescale_factor": 1 / 255, "do_rescale": True, "do_resize": True, "do_center_crop": True}, {}),
        ({"rescale_factor": 0.0039215686}, {}),
        ({"rescale_factor": 1 / 127.5}, scaled(0.5)),
        ({"rescale_factor": 0}, {}),
        ({"do_rescale": False}, scaled(1 / 255)),
        ({"do_rescale": False, "rescale_factor": 7.0}, scaled(1 / 255)),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({"do_normalize": False, "image_mean": [1, 2]}, {"mean": (0.0, 0.0), "std": (1.0, 1.0)}),
        ({"do_normalize": False, "image_mean": None}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({"image_mean": 0.25, "image_std": 1}, {"mean": (0.25,) * 3, "std": (1.0,) * 3}),
        ({"image_mean": None}, {"mean": None}),
        ({"resample": 0}, {"interpolation": "nearest"}),
        ({"resample": 1}, {"interpolation": "lanczos"}),
        ({"resample": 3}, {"interpolation": "bicubic"}),
        ({"resample": 4}, {"interpolation": None}),
        ({"resample": None}, {"interpolation": None}),
        ({"do_center_crop": False}, {"crop": 300}),
        ({"do_resize": False}, {"resize": None}),
        ({"do_resize": False, "do_center_crop": False}, {"resize": None, "crop": 300}),
        ({"size": {"height": 224, "width": 224}}, {"resize": (224, 224)}),
        ({"size": {"height": 224, "width": 280}, "do_center_crop": False}, {"resize": (224, 280), "crop": (224, 280)}),
        ({"crop_size": {"height": 224, "width": 280}}, {"crop": (224, 280)}),
        ({"size": 256, "crop_size": 224}, {"resize": 256, "crop": 224}),
        # One number is of all three channels. A factor of 1 / 510 doubles what is taken off and divided by.
        ({"image_mean": 0.25, "image_std": 2}, {"mean": (0.25,) * 3, "std": (2.0,) * 3}),
        (
            {"image_mean": [0.5, 0.25], "image_std": [1.0, 2.0], "rescale_factor": 1 / 510},
            {"mean": (1.0, 0.5), "std": (2.0, 4.0)},
        ),
        ({"size": {"height": 224}, "crop_size": {"width": 3}}, {"resize": None, "crop": None}),
        ({"size": {"shortest_edge": 256, "height": 1, "width": 2}}, {"resize": 256}),
        ({"size": None, "crop_size": None}, {"resize": None, "crop": None}),
        ({"keep_aspect_ratio": True}, {"resize": None, "crop": None}),
        ({"ensure_multiple_of": 14}, {"resize": None, "crop": None}),
        ({"ensure_multiple_of": 1, "keep_aspect_ratio": False}, {}),
        ({"ensure_multiple_of": None}, {}),
    ],
)
def test_an_image_processor(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    found = said(tmp_path, config={"model_type": "dinov2"}, preprocessor_config=PROCESSOR | changes)
    wanted = {key: value for key, value in (PREPARED | expected).items() if value is not None}
    assert found.keys() == {"register_count", *wanted}
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-7) if isinstance(value, tuple) else found[key] == value
        assert type(found[key]) is type(value), key


@pytest.mark.parametrize("mean", [[], [True, 1, 1], ["a"], "a", True])
def test_a_mean_that_is_no_numbers(mean: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="image_mean"):
        said(tmp_path, config={"model_type": "dinov2"}, preprocessor_config={"image_mean": mean})


TIMM = {
    "architecture": "vit_small_patch14_dinov2",
    "model_args": {"embed_dim": 48, "depth": 2, "patch_size": 14, "in_chans": 4, "reg_tokens": 4, "qkv_bias": False},
    "pretrained_cfg": {"mean": HALF, "std": [1, 2, 3], "interpolation": "bicubic", "input_size": [3, 518, 518]},
}  # fmt: skip
TIMMS = {
    "embed_dim": 48, "depth": 2, "num_heads": 6, "patch_size": 14, "in_chans": 4, "register_count": 4,
    "qkv_bias": False, "mean": tuple(HALF), "std": (1.0, 2.0, 3.0), "interpolation": "bicubic",
    "crop": 518, "resize": 518,
}  # fmt: skip


def test_a_configuration_of_timm(tmp_path: Path) -> None:
    assert said(tmp_path / "a", config=TIMM) == TIMMS
    flat = without(TIMM, "pretrained_cfg") | TIMM["pretrained_cfg"]  # type: ignore[operator]
    assert said(tmp_path / "b", config=flat) == TIMMS, "as older files have it"


@pytest.mark.parametrize(
    ("size", "heads"),
    [("small", 6), ("base", 12), ("large", 16), ("giant", 24), ("so150m", None), ("tiny", None)],
)
def test_heads_by_timms_names(size: str, heads: int | None, tmp_path: Path) -> None:
    own = TIMM | {"architecture": f"vit_{size}_patch16_224"}
    assert said(tmp_path / "a", config=own).get("num_heads") == heads
    assert said(tmp_path / "b", config=own | {"model_args": {"num_heads": 7}})["num_heads"] == 7


@pytest.mark.parametrize(("dynamic", "expected"), [(True, (0.0, True)), (False, (None, None)), (None, (None, None))])
def test_timms_dynamic_sizes(dynamic: bool | None, expected: tuple[Any, Any], tmp_path: Path) -> None:
    found = said(tmp_path, config=TIMM | {"model_args": {"dynamic_img_size": dynamic}})
    assert (found.get("interpolate_offset"), found.get("interpolate_antialias")) == expected


@pytest.mark.parametrize(
    ("shown", "crop", "resize"),
    [
        ({"input_size": [3, 224, 224], "crop_pct": 0.875}, 224, 256),
        ({"input_size": [3, 224, 224], "crop_pct": 0.9}, 224, 248),
        ({"input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "squash"}, 224, (224, 224)),
        ({"input_size": [3, 224, 280], "crop_pct": 0.875}, (224, 280), (224, 280)),
        ({"input_size": [224, 224]}, None, None),
        ({"input_size": [3, 224.0, 224]}, None, None),
        ({}, None, None),
    ],
)
def test_sizes_of_timm(shown: dict[str, Any], crop: Any, resize: Any, tmp_path: Path) -> None:
    found = said(tmp_path, config=TIMM | {"pretrained_cfg": shown})
    assert (found.get("crop"), found.get("resize")) == (crop, resize)


UPSTREAM = {
    "student": {
        "arch": "vit_large", "patch_size": 14, "num_register_tokens": 4, "in_chans": 4, "qkv_bias": False,
        "interpolate_offset": 0.0, "interpolate_antialias": True, "ffn_layer": "swiglufused",
    },
    "crops": {"global_crops_size": 230},
}  # fmt: skip
UPSTREAMS = {
    "patch_size": 14, "register_count": 4, "in_chans": 4, "qkv_bias": False, "interpolate_offset": 0.0,
    "interpolate_antialias": True, "num_heads": 16, "feed_forward": "swiglu", "position_side": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({}, {}),
        ({"interpolate_offset": None, "interpolate_antialias": None},
         {"interpolate_offset": 0.1, "interpolate_antialias": False}),
        ({"arch": "vit_giant2"}, {"num_heads": 24}),
        ({"arch": "vit_so150m"}, {"num_heads": 13}),
        ({"arch": "vit_tiny"}, {"num_heads": None}),
        ({"arch": None}, {"num_heads": None}),
        ({"ffn_layer": "mlp"}, {"feed_forward": "mlp"}),
        ({"ffn_layer": None}, {"feed_forward": None}),
        ({"patch_size": None}, {"patch_size": None, "position_side": None}),
    ],
)  # fmt: skip
def test_upstreams_training(student: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    found = said(tmp_path, training=UPSTREAM | {"student": UPSTREAM["student"] | student})
    assert found == {key: value for key, value in (UPSTREAMS | expected).items() if value is not None}


def test_upstreams_run_folder(tmp_path: Path) -> None:
    """RUN/eval/training_N holds the weights, RUN the configuration; no other folder above is looked into."""
    said(tmp_path / "run", training=UPSTREAM)
    assert said(tmp_path / "run" / "eval" / "training_1") == UPSTREAMS
    assert said(tmp_path / "run" / "other" / "training_1") == said(tmp_path / "run" / "eval" / "a" / "b") == {}


def test_two_files_are_both_read(tmp_path: Path) -> None:
    both = said(tmp_path, config=HUGGING_FACE, training=UPSTREAM | {"student": {"arch": "vit_small"}})
    assert both["embed_dim"] == 48 and both["interpolate_offset"] == 0.1
    assert said(tmp_path / "other", training={"teacher": {}}) == {}
