"""What lies beside a user's weights is read: Hugging Face's, timm's and upstream's configurations.

The oracles are transformers and timm themselves, on a grid that is not the table's own too: a folder as they save it
makes a recipe, and the tokens must be theirs. What contradicts a recipe stops the build; what nobody says is named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dinoexport import bundle, cli, family
from dinoexport.config import recipe as recipes
from dinoexport.config.recipe import Recipe
from dinoexport.errors import UsageError
from dinoexport.models.dinov2 import synthetic
from dinoexport.spec import Precision, silent
from dinoexport.validation.metrics import distance
from dinoexport.weights import checkpoint
from tests.checkpoint_files import TINY, opened, save_pth, save_safetensors, settled, tiny_state
from tests.models.test_layouts import scattered, timm_model, timm_vit

__all__ = ["timm_vit"]
MEAN, STD = [0.707223, 0.578729, 0.703617], [0.211883, 0.230117, 0.177517]
# The table's own grid and two others; height unlike width.
SIZES = ((224, 224), (168, 280), (14, 308))


def hugging_face(folder: Path, *, registers: int = 0, **more: Any) -> Any:
    """A folder as save_pretrained writes it: trained at 224 pixels, 6 heads of 8 channels, another epsilon."""
    import transformers

    facts = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 224, "patch_size": 14,
        "layer_norm_eps": 1e-3,
    }  # fmt: skip
    if registers:
        config: Any = transformers.Dinov2WithRegistersConfig(**(facts | more), num_register_tokens=registers)
        model: Any = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**(facts | more)))
    scattered(model).save_pretrained(folder)
    write(folder, "preprocessor_config.json", PROCESSOR)
    return model


PROCESSOR = {
    "do_center_crop": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN,
    "image_std": STD, "resample": 2, "rescale_factor": 1 / 255, "size": {"shortest_edge": 300},
    "crop_size": {"height": 280, "width": 280},
}  # fmt: skip


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def tokens(recipe: Recipe, source: Path, size: tuple[int, int]) -> dict[str, Any]:
    """By the plain formulation and by the traced modules, which must agree."""
    from tests import conformance

    model = family.find("dinov2").model(recipe)
    read = opened(source, recipe).read
    inputs = [{"pixels": synthetic.pixels(1, *size, 7)}]
    (expected,) = model.reference(read, inputs, precision=Precision.FP32, progress=silent)
    (ours,) = conformance.eagerly(model, read, inputs)
    for name in expected:
        assert distance(ours[name], expected[name]).relative_l2 <= 1e-5, name
    return dict(expected)


def assert_theirs(recipe: Recipe, source: Path, theirs: Any, registers: int) -> None:
    for size in SIZES:
        ours = tokens(recipe, source, size)
        with torch.inference_mode():
            expected = theirs(torch.from_numpy(synthetic.pixels(1, *size, 7))).numpy()
        assert distance(ours["class_token"], expected[:, 0]).relative_l2 <= 1e-5, size
        assert distance(ours["patch_tokens"], expected[:, 1 + registers :]).relative_l2 <= 1e-5, size


@pytest.mark.parametrize("registers", [0, 4])
def test_a_folder_of_hugging_face_is_transformers(tmp_path: Path, registers: int) -> None:
    """Heads, epsilon and preprocessing are read; how transformers resizes, a recipe of its own can say."""
    theirs = hugging_face(tmp_path, registers=registers)
    found = settled(tmp_path, None)
    assert found.made
    says = found.recipe.model
    assert (says["num_heads"], says["layer_norm_eps"], says["position_side"]) == (6, 1e-3, 16)
    assert found.recipe.preprocess == {
        "mean": tuple(MEAN), "std": tuple(STD), "resize": 300, "crop": 280, "interpolation": "bilinear",
    }  # fmt: skip
    assert set(found.assumed) == {"model.interpolate_offset", "model.interpolate_antialias"}
    # transformers resizes by size, antialiased where there are registers.
    own = says | {"interpolate_offset": 0.0, "interpolate_antialias": bool(registers)}
    recipe = found.recipe.changed(model=own)
    assert settled(tmp_path, recipe).assumed == {}
    assert_theirs(recipe, tmp_path, lambda pixels: theirs(pixels).last_hidden_state, registers)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_folder_of_timm_is_timm(tmp_path: Path, timm_vit: Any, registers: int) -> None:
    """With dynamic_img_size timm resizes by size and antialiased, registers or not; its config.json says so."""
    arguments = {"img_size": 224, "dynamic_img_size": True, "num_heads": 4}
    theirs = timm_model(timm_vit, TINY.changed(model=TINY.model | {"register_count": registers}), **arguments)
    save_safetensors(tmp_path / "model.safetensors", theirs.state_dict())
    shown = {"mean": MEAN, "std": STD, "input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch14_dinov2", "model_args": arguments, "pretrained_cfg": shown}
    write(tmp_path, "config.json", config)
    found = settled(tmp_path, None)
    says = found.recipe.model
    assert (says["interpolate_offset"], says["interpolate_antialias"], says["position_side"]) == (0.0, True, 16)
    assert (found.recipe.preprocess["resize"], found.recipe.preprocess["crop"]) == (256, 224)
    assert not {key for key in found.assumed if "interpolate" in key or "preprocess" in key or "heads" in key}
    assert_theirs(found.recipe, tmp_path, theirs.forward_features, registers)


UPSTREAM = """
student: {arch: vit_small, patch_size: 14, num_register_tokens: 4, ffn_layer: mlp, qkv_bias: true%s}
crops: {global_crops_size: 224, local_crops_size: 98}
optim: {lr: 0.004}
"""


def training_run(folder: Path, config: str, side: int = 16) -> Path:
    """As upstream's training leaves it: the run's config.yaml, and the teacher two folders further down."""
    place = folder / "run" / "eval" / "training_9"
    place.mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text(config)
    state = tiny_state() | {"pos_embed": torch.ones(1, 1 + side * side, 48), "register_tokens": torch.ones(1, 4, 48)}
    return save_pth(place / "teacher_checkpoint.pth", {"teacher": {f"backbone.{n}": t for n, t in state.items()}})


def with_registers(**model: Any) -> Recipe:
    return TINY.changed(model=TINY.model | {"register_count": 4, "num_heads": 6} | model)


@pytest.mark.parametrize(
    ("more", "offset", "antialias"),
    [("", 0.1, False), (", interpolate_offset: 0.0, interpolate_antialias: true", 0.0, True)],
)
def test_upstreams_training_says_how_it_resized(tmp_path: Path, more: str, offset: float, antialias: bool) -> None:
    """Registers trained by its default: 0.1 and no antialias, unlike the published models with registers."""
    path = training_run(tmp_path, UPSTREAM % more)
    found = settled(path, with_registers())
    says = found.recipe.model
    assert (says["interpolate_offset"], says["interpolate_antialias"]) == (offset, antialias)
    assert says["position_side"] == 16
    assert not any("interpolate" in key for key in found.assumed)


# The silent errors: what made graph and judge agree on something wrong now stops the build


def test_a_wrong_offset_stops(tmp_path: Path) -> None:
    path = training_run(tmp_path, UPSTREAM % "")
    with pytest.raises(UsageError, match=r"interpolate_offset = 0\.0.*says 0\.1"):
        settled(path, with_registers(interpolate_offset=0.0))
    with pytest.raises(UsageError, match=r"interpolate_antialias = True.*says False"):
        settled(path, with_registers(interpolate_antialias=True))


def test_a_wrong_antialias_of_timms_stops(tmp_path: Path) -> None:
    save_pth(tmp_path / "model.pth", tiny_state())
    config = {"architecture": "vit_small_patch14_dinov2", "model_args": {"dynamic_img_size": True, "num_heads": 2}}
    write(tmp_path, "config.json", config)
    with pytest.raises(UsageError, match=r"interpolate_antialias = False.*says True"):
        settled(tmp_path, TINY.changed(model=TINY.model | {"interpolate_antialias": False}))


@pytest.mark.parametrize(
    ("table", "key", "wrong"),
    [("preprocess", "mean", [0.485, 0.456, 0.406]), ("preprocess", "std", [0.2, 0.2, 0.2]),
     ("preprocess", "crop", 224), ("preprocess", "interpolation", "bicubic"),
     ("model", "num_heads", 12), ("model", "activation", "relu"), ("model", "layer_norm_eps", 1e-6)],
)  # fmt: skip
def test_what_a_folder_of_hugging_face_contradicts_stops(tmp_path: Path, table: str, key: str, wrong: Any) -> None:
    """Both values are named; mean, heads and activation gave a PASSED before."""
    hugging_face(tmp_path)
    right = settled(tmp_path, None).recipe
    changed = {table: {**getattr(right, table), key: wrong}}
    with pytest.raises(UsageError, match=f"{table}.{key}") as caught:
        settled(tmp_path, right.changed(**changed))
    assert "config.json" in caught.value.message and "the recipe" in caught.value.message


def test_a_published_variant_is_not_built_with_other_heads(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    with pytest.raises(UsageError, match=r"num_heads = 2, config\.json: num_attention_heads says 6"):
        settled(tmp_path, TINY)


def test_files_that_contradict_the_weights_stop(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, "config.json", config | {"image_size": 518})
    with pytest.raises(UsageError, match=r"position_side = 16.*says 37"):
        settled(tmp_path, None)


@pytest.mark.parametrize(
    ("config", "says"),
    [({"hidden_act": "quick_gelu"}, "activation"), ({"num_attention_heads": "six"}, "num_attention_heads is 'six'"),
     ({"num_attention_heads": True}, "num_attention_heads is True"), ({"num_attention_heads": 5}, "does not divide")],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    hugging_face(tmp_path)
    write(tmp_path, "config.json", json.loads((tmp_path / "config.json").read_text()) | config)
    with pytest.raises(UsageError, match=says):
        family.find("dinov2").model(settled(tmp_path, None).recipe)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_configuration_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    hugging_face(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        settled(tmp_path, None)


PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing normalised": ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    "pixels of 0..255": (
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3},
        {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
    ),
    "one mean for all": ({"image_mean": 0.5, "image_std": 0.25}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
    "no crop": (
        {"do_center_crop": False, "size": {"height": 224, "width": 280}}, {"resize": (224, 280), "crop": (224, 280)},
    ),
    "plain numbers": ({"size": 256, "crop_size": 224}, {"resize": 256, "crop": 224}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
def test_image_processors(tmp_path: Path, kind: str) -> None:
    changes, expected = PROCESSORS[kind]
    hugging_face(tmp_path)
    write(tmp_path, "preprocessor_config.json", PROCESSOR | changes)
    found = settled(tmp_path, None).recipe
    preprocessing = family.find("dinov2").model(found).preprocessing
    for key, value in expected.items():
        assert getattr(preprocessing, key) == pytest.approx(value), key


# What nobody says


def test_what_nobody_says_is_named(tmp_path: Path) -> None:
    """Of a file alone: offset, antialias, epsilon, mean; and nothing of it where the hash is a published one's."""
    path = save_pth(tmp_path / "w.pth", tiny_state())
    found = settled(path)
    assert set(found.assumed) == {
        "model.interpolate_offset", "model.interpolate_antialias", "model.layer_norm_eps", "model.activation",
        "preprocess.mean", "preprocess.std",
    }  # fmt: skip
    assert "0.1, as the published models without registers" in found.assumed["model.interpolate_offset"]
    assert found.recipe.model["interpolate_offset"] == 0.1
    stated = TINY.changed(
        model=TINY.model | {"interpolate_offset": 0.0, "interpolate_antialias": True, "layer_norm_eps": 1e-6},
        preprocess={"mean": MEAN, "std": STD},
    )
    assert set(settled(path, stated).assumed) == {"model.activation"}


def test_weights_that_are_not_published_are_yours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, licence, card and where they are from; with the published hash they stay what they are."""
    model = family.find("dinov2").model(recipes.load("vits14"))
    number = torch.zeros(1)
    path = save_pth(tmp_path / "w.pth", {name: number.expand(shape) for name, shape in model.tensors.items()})
    found = settled(path, recipes.load("vits14")).recipe
    assert (found.name, found.licence, found.weights) == ("vits14-yours", "yours", ())
    card = family.find("dinov2").model(found).card
    assert "LVD" not in str(card) and "yours" in card["model"] and "yours" in card["training_data"]
    own = recipes.load("vits14").changed(licence="MIT", name="mine")
    assert (settled(path, own).recipe.licence, settled(path, own).recipe.name) == ("MIT", "mine")
    published = recipes.load("vits14").weights[0].sha256
    monkeypatch.setattr(checkpoint, "digest_of", lambda source, progress: published)
    for wanted in (recipes.load("vits14"), None):
        found = settled(path, wanted)
        assert found.recipe == recipes.load("vits14") and found.assumed == {}


def test_heads_are_not_guessed_of_widths_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="48 wide") as caught:
        settled(save_pth(tmp_path / "w.pth", tiny_state()), None)
    assert "num_heads" in caught.value.next_step


def test_weights_of_no_family(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no installed family"):
        settled(save_pth(tmp_path / "w.pth", {"fc.weight": torch.ones(2, 2)}), None)


def test_a_made_recipe_can_be_kept(tmp_path: Path) -> None:
    """What is printed is a recipe: read again it is the same one."""
    hugging_face(tmp_path)
    found = settled(tmp_path, None).recipe
    (tmp_path / "mine.toml").write_text(recipes.to_toml(found))
    again = recipes.load(str(tmp_path / "mine.toml"))
    assert json.loads(again.model_dump_json()) == json.loads(found.model_dump_json())


def test_export_without_a_recipe(tmp_path: Path) -> None:
    """The command line: the recipe is printed, what was assumed is named, and both are in the manifest."""
    hugging_face(tmp_path)
    out = tmp_path / "bundle"
    done = CliRunner().invoke(cli.app, ["export", "--weights", str(tmp_path), "--out", str(out), "--target", "cpu"])
    assert done.exit_code == 0, done.output
    assert "num_heads = 6" in done.output and "ASSUMED: model.interpolate_offset = 0.1" in done.output
    manifest = bundle.read_manifest(out)
    assert "model.interpolate_offset" in manifest.checkpoint.assumed
    assert manifest.recipe["model"]["num_heads"] == 6 and manifest.recipe["preprocess"]["crop"] == 280
    shown = CliRunner().invoke(cli.app, ["inspect", str(out)])
    assert "interpolate_antialias" in " ".join(shown.output.split())
    nothing = CliRunner().invoke(cli.app, ["export"])
    assert nothing.exit_code == 2 and "--weights" in nothing.output


def test_long_lists_are_short_on_a_terminal(tmp_path: Path) -> None:
    """At most 20 lines, and all of it with --json."""
    path = save_pth(tmp_path / "w.pth", tiny_state())
    done = CliRunner().invoke(cli.app, ["export", "vitg14", "--weights", str(path)])
    assert done.exit_code == 3
    assert len(done.stderr.rstrip("\n").splitlines()) <= 20
    whole = json.loads(CliRunner().invoke(cli.app, ["export", "vitg14", "--weights", str(path), "--json"]).stdout)
    assert len(whole["error"].splitlines()) > 100


def test_preprocessing_is_the_recipes_everywhere(tmp_path: Path) -> None:
    """Cases, front ends and images of the user's are prepared as the recipe says."""
    from io import BytesIO

    from PIL import Image

    hugging_face(tmp_path)
    recipe = settled(tmp_path, None).recipe
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (400, 500, 3), dtype=np.uint8))
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "x.png")
    resized = np.asarray(picture.resize((375, 300), Image.Resampling.BILINEAR))[10:290, 48:328]
    exact = (resized / 255 - np.array(MEAN)) / np.array(STD)
    model = family.find("dinov2").model(recipe)
    stored = BytesIO()
    picture.save(stored, "PNG")
    (own,) = model.cases_from(tmp_path / "images", progress=silent)
    case = model.case({"name": "p", "why": "a photograph", "photographs": ["x.png"]}, tmp_path)
    assert [end.name for end in model.front_ends(None, progress=silent)] == ["images"]
    for pixels in (
        own.inputs["pixels"], case.inputs["pixels"], model.prepare("images", {}, [stored.getvalue()])["pixels"],
    ):  # fmt: skip
        np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), exact, atol=1e-5)
