"""Named profiles: resolved, refused where they cannot be, and their memory estimated near what the compiler asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dinoexport.config import recipe
from dinoexport.config.recipe import EngineChoices, Range, Recipe, load
from dinoexport.engines import builder, profiles
from dinoexport.errors import MissingRequirement, UsageError
from dinoexport.family import find
from dinoexport.pipeline import build as pipeline
from dinoexport.spec import Dim, Graph, Precision, Runtime, Tensor
from tests.conftest import DATA
from tests.engines.test_builder import built, exported

STEP = Graph(
    name="step",
    inputs=(
        Tensor(name="ids", dtype="int64", shape=("batch", 1), meaning="tokens"),
        Tensor(name="past", dtype="float32", shape=("batch", "length", 8), meaning="cache"),
    ),
    outputs=(),
    dims=(Dim(name="batch", min=1, opt=2, max=4), Dim(name="length", min=3, opt=30, max=300, step=3)),
)


def test_a_profile_takes_every_dimensions_range() -> None:
    whole = profiles.profile("whole", STEP, {})
    assert whole.shapes == {"ids": ((1, 1), (2, 1), (4, 1)), "past": ((1, 3, 8), (2, 30, 8), (4, 300, 8))}
    short = profiles.profile("short", STEP, {"length": Range(min=3, opt=6, max=9)})
    assert short.shapes["past"] == ((1, 3, 8), (2, 6, 8), (4, 9, 8))


def test_named_sizes_are_profiles_of_their_own_before_the_wide_one(tmp_path: Path) -> None:
    """Both writings of a size are one; each size has a case that it is judged by."""
    (tmp_path / "sized.toml").write_text(
        (DATA / "tiny_swiglu.toml")
        .read_text()
        .replace("[model]", 'sizes = ["224x224", "1x224x224", "3x56x98"]\n\n[model]', 1)
    )
    for path in DATA.glob("tiny_cases.toml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    request = pipeline.build_request(
        str(tmp_path / "sized.toml"), weights="synthetic:0", target="a100", runtime=Runtime.TENSORRT_RTX
    )
    assert request.engine is not None
    (found,) = request.engine.profiles.values()
    assert [profile.name for profile in found] == ["size_224x224", "size_3x56x98", profiles.WHOLE]
    assert found[1].shapes["pixels"] == ((3, 3, 56, 98),) * 3
    shapes = [case.inputs["pixels"].shape for case in request.cases]
    assert (1, 3, 224, 224) in shapes and (3, 3, 56, 98) in shapes
    assert len(request.cases) == len({case.name for case in request.cases})
    (tmp_path / "sized.toml").write_text((tmp_path / "sized.toml").read_text().replace("3x56x98", "3x56x9800"))
    with pytest.raises(UsageError, match="9800"):
        pipeline.build_request(str(tmp_path / "sized.toml"), weights="synthetic:0", target="cpu")


@pytest.mark.parametrize(
    ("shapes", "covered"),
    [
        ({"ids": (1, 1), "past": (1, 3, 8)}, True),
        ({"ids": (4, 1), "past": (4, 300, 8)}, True),
        ({"ids": (5, 1), "past": (4, 300, 8)}, False),
        ({"ids": (4, 1), "past": (4, 301, 8)}, False),
        ({"ids": (4, 1), "past": (4, 2, 8)}, False),
        ({"ids": (4, 1), "past": (4, 30)}, False),
    ],
)
def test_what_a_profile_covers(shapes: dict[str, tuple[int, ...]], covered: bool) -> None:
    assert profiles.profile("whole", STEP, {}).covers(shapes) is covered


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({"lenght": Range(min=3, opt=3, max=3)}, r"the model has no dimension 'lenght'\. Did you mean 'length'"),
        ({"batch": Range(min=1, opt=1, max=5)}, r"batch 1 to 5 exceeds \[profile\]'s 1 to 4"),
        ({"length": Range(min=2, opt=6, max=9)}, r"length 2 to 9 exceeds \[profile\]'s 3 to 300\."),
        ({"length": Range(min=3, opt=4, max=9)}, "length 4 is not a multiple of 3"),
    ],
)
def test_wrong_profiles_are_named(ranges: dict[str, Range], words: str) -> None:
    with pytest.raises(UsageError, match=rf"\[profiles\.mine\]: {words}"):
        profiles.profile("mine", STEP, ranges)


def test_a_dimension_without_a_range_is_named() -> None:
    with pytest.raises(UsageError, match="needs a range for length"):
        profiles.profile("whole", replace(STEP, dims=STEP.dims[:1]), {})


def wanted(name: str, *chosen: str) -> tuple[Recipe, Graph]:
    loaded = load(name).model_copy(update={"engine": EngineChoices(profiles=chosen)})
    return loaded, find(loaded.family).model(loaded).graphs[0]


@pytest.mark.parametrize("variant", [v for v in recipe.variants() if recipe.load(v).family == "dinov2"])
def test_every_shipped_profile_is_legal(variant: str) -> None:
    named = tuple(load(variant).profiles)
    found = {profile.name: profile for profile in profiles.of(*wanted(variant, *named))}
    assert tuple(found) == named and "latency" in found
    assert found["latency"].shapes["pixels"][2][0] == 1
    if "hires" in found:
        assert found["hires"].shapes["pixels"][2][2:] == (1022, 1022)


def test_the_recipe_chooses(tmp_path: Path) -> None:
    assert [p.name for p in profiles.of(*wanted("vits14"))] == ["whole"]
    with pytest.raises(UsageError, match=r"no profile 'hirez'\. Did you mean 'hires'") as caught:
        profiles.of(*wanted("vits14", "hirez"))
    assert caught.value.next_step == f"It has: {', '.join(load('vits14').profiles)}."
    without, graph = wanted("vits14", "hires")
    with pytest.raises(UsageError, match="no profile 'hires'") as caught:
        profiles.of(without.model_copy(update={"profiles": {}}), graph)
    assert caught.value.next_step == "It has: none; add [profiles.NAME]."
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'base = "vits14"\n[profiles.odd]\nheight = { min = 14, opt = 225, max = 518 }\n[engine]\nprofiles = ["odd"]\n'
    )
    with pytest.raises(UsageError, match=r"\[profiles\.odd\]: height 225 is not a multiple of 14"):
        pipeline.build_request(str(mine), target="a100")
    mine.write_text('base = "vits14"\n[profiles.odd]\nheight = { min = 28, opt = 14, max = 518 }\n')
    with pytest.raises(UsageError, match="needs min <= opt <= max"):
        pipeline.build_request(str(mine), target="a100")
    request = pipeline.build_request("vits14", target="a100", engine_choices={"profiles": ("hires", "latency")})
    assert [p.name for p in request.engine.profiles["model"]] == ["hires", "latency"]


@pytest.fixture(scope="module")
def vits14(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph]:
    return exported("vits14", Precision.FP16, tmp_path_factory.mktemp("vits14"))


def test_the_estimate_is_near_what_the_compiler_asks_for(vits14: tuple[Path, Graph], tmp_path: Path) -> None:
    """The second opinion is TensorRT-RTX's own: what it says an engine of several profiles needs is its largest's."""
    path, graph = vits14
    named = [
        profiles.profile("one", graph, {"batch": Range(min=1, opt=1, max=1)}),
        profiles.profile("many", graph, {d: Range(min=14, opt=224, max=518) for d in ("height", "width")}),
    ]
    made = built(path, graph, tmp_path, "8.0", profiles=named)
    assert made.fused_attentions == 12, "in both profiles, each layer counted once"
    estimate = max(profiles.scratch_bytes(path, p) for p in named)
    assert made.scratch_bytes < estimate < 1.6 * made.scratch_bytes


def test_an_engine_too_large_for_its_card_is_refused_with_what_would_fit(vits14: tuple[Path, Graph]) -> None:
    path, graph = vits14
    whole = profiles.profile("whole", graph, {})

    def check(memory_bytes: int) -> None:
        builder.check_memory(path, graph, [whole], memory_bytes=memory_bytes, where="the smallest toy")

    check(10**9)
    with pytest.raises(
        MissingRequirement, match=r"Profile whole needs about 0\.8 GB .* the smallest toy has 0\.4 GB"
    ) as no:
        check(4 * 10**8)
    batch = int(no.value.next_step.split("batch up to ")[1].split()[0])
    narrowed = profiles.profile("whole", graph, {"batch": Range(min=1, opt=1, max=batch)})
    larger = profiles.profile("whole", graph, {"batch": Range(min=1, opt=1, max=batch + 1)})
    weights = path.with_name("model.onnx.data").stat().st_size
    needs = [weights + profiles.scratch_bytes(path, p) for p in (narrowed, larger)]
    assert needs[0] <= 4 * 10**8 < needs[1], "the largest that fits, and no larger"
    with pytest.raises(MissingRequirement) as nothing:
        check(10**6)
    assert "larger card" in nothing.value.next_step
    scratch = profiles.scratch_bytes(path, whole)
    assert weights + scratch > scratch + 10**7
    streamed = EngineChoices(weight_streaming=True)
    settings = {"memory_bytes": scratch + 10**7, "where": "a small card"}
    with pytest.raises(MissingRequirement):
        builder.check_memory(path, graph, [whole], **settings)
    builder.check_memory(path, graph, [whole], choices=streamed, **settings)
    with pytest.raises(MissingRequirement):
        builder.check_memory(path, graph, [whole], choices=streamed, memory_bytes=scratch, where="a smaller one")
    several = [profiles.profile(name, graph, {}) for name in ("one", "two", "three")]
    builder.check_memory(path, graph, several, memory_bytes=weights + scratch, where="one scratch buffer's card")


def test_a_build_asks_before_the_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoexport.validation import evaluate

    monkeypatch.setattr(evaluate, "compute_reference", lambda *_, **__: pytest.fail("PyTorch was asked first"))
    recipe_file = tmp_path / "huge.toml"
    tiny = (DATA / "tiny_swiglu.toml").read_text()
    recipe_file.write_text(tiny.replace("max = 4 }", "max = 4096 }"))
    (tmp_path / "tiny_cases.toml").write_bytes((DATA / "tiny_cases.toml").read_bytes())
    request = pipeline.build_request(str(recipe_file), weights="synthetic:0", target="l4", out=tmp_path / "b")
    with pytest.raises(MissingRequirement, match=r"Profile whole needs about .* the smallest l4 has 24\.0 GB"):
        pipeline.build(request)
    assert not (tmp_path / "b").exists()
