"""Files of heads that do not belong to the head or the variant that was asked for: one error that names both."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoexport.config import recipe
from dinoexport.config.recipe import WeightFile
from dinoexport.errors import DinoexportError
from dinoexport.family import find
from dinoexport.models.dinov2.heads.layouts import published_name
from dinoexport.spec import silent
from dinoexport.weights import download
from dinoexport.weights.checkpoint import Checkpoint, HeadSource, open_checkpoint


def opened(variant: str, head: str, path: Path) -> Checkpoint:
    wanted = recipe.load(variant).with_head(head)
    model = find("dinov2").model(wanted)
    return open_checkpoint(model, wanted, "synthetic:0", head_source=str(path), progress=silent)


def head_file(path: Path, variant: str, head: str, classes: int | None = None) -> Path:
    """The file of a head as it is published: a bare classifier, or mmcv's checkpoint around `state_dict`.

    Its tensors share one stored number, so that it takes kilobytes.
    """
    model = find("dinov2").model(recipe.load(variant).with_head(head))
    number = torch.zeros(1)
    state = {
        published_name(name): number.expand(shape if classes is None else (classes, *shape[1:]))
        for name, shape in model.head_weights.tensors.items()
    }
    bare = head in ("linear", "linear4")
    torch.save(state if bare else {"meta": {"epoch": 1}, "state_dict": state, "optimizer": {}}, path)
    return path


@pytest.mark.parametrize(
    ("made_for", "asked_for", "words"),
    [
        (("vits14", "nyu_linear4"), ("vits14", "nyu_linear"), "nyu_linear of vits14: this is the file of nyu_linear4"),
        (("vits14", "nyu_linear"), ("vits14", "nyu_dpt"), "nyu_dpt of vits14: this is the file of nyu_linear or"),
        (("vitb14", "nyu_dpt"), ("vits14", "nyu_dpt"), "this is the file of nyu_dpt or kitti_dpt of vitb14"),
        (("vits14", "voc2012_ms"), ("vits14", "ade20k_ms"), "ade20k_ms of vits14: this is the file of voc2012_ms"),
        (("vitg14_reg", "linear"), ("vits14_reg", "linear"), "vits14_reg: this is the file of linear of vitg14"),
    ],
)  # fmt: skip
def test_another_heads_file_is_named(
    made_for: tuple[str, str], asked_for: tuple[str, str], words: str, tmp_path: Path
) -> None:
    path = head_file(tmp_path / "head.pth", *made_for)
    opened(*made_for, path)
    with pytest.raises(DinoexportError, match=words):
        opened(*asked_for, path)


@pytest.mark.parametrize(
    ("made_for", "asked_for", "name"),
    [
        # The shapes are the same, so only the published name of the file tells them apart.
        (("vits14", "kitti_dpt"), ("vits14", "nyu_dpt"), "dinov2_vits14_kitti_dpt_head.pth"),
        (("vits14_reg", "linear4"), ("vits14", "linear4"), "dinov2_vits14_reg4_linear4_head.pth"),
    ],
)
def test_a_file_under_another_heads_published_name_is_refused(
    made_for: tuple[str, str], asked_for: tuple[str, str], name: str, tmp_path: Path
) -> None:
    path = head_file(tmp_path / name, *made_for)
    opened(*made_for, path)
    with pytest.raises(DinoexportError) as caught:
        opened(*asked_for, path)
    message = f"{name} is the name of the {made_for[1]} head published for {made_for[0]}"
    assert caught.value.message == f"{message}; this build has {asked_for[1]} of {asked_for[0]}."
    opened(*asked_for, path.rename(tmp_path / "mine.pth"))


def test_another_number_of_classes_is_shown_with_both_numbers(tmp_path: Path) -> None:
    path = head_file(tmp_path / "head.pth", "vits14", "linear", classes=10)
    with pytest.raises(DinoexportError) as caught:
        opened("vits14", "linear", path)
    assert "does not fit the head linear of vits14" in caught.value.message
    assert "linear_head.bias is (10,), needs (1000,)" in caught.value.message


def test_a_backbones_file_is_no_head(tmp_path: Path) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 384), "pos_embed": torch.zeros(1, 1370, 384)}, tmp_path / "head.pth")
    with pytest.raises(DinoexportError, match="does not fit the head linear of vits14"):
        opened("vits14", "linear", tmp_path / "head.pth")


class Estimator:
    """Unpickling it would write a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("name", ["head.pkl", "head.joblib", "head.pth", "head.pt"])
def test_a_pickled_estimator_is_never_run(name: str, tmp_path: Path) -> None:
    path, proof = tmp_path / name, tmp_path / "ran"
    path.write_bytes(pickle.dumps(Estimator(proof)))
    with pytest.raises(DinoexportError) as caught:
        opened("vits14", "linear", path)
    assert name in caught.value.message and caught.value.next_step
    torch.save({"classifier": Estimator(proof)}, path)
    with pytest.raises(DinoexportError):
        opened("vits14", "linear", path)
    assert not proof.exists()


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.pth", "none.pth"), (tmp_path, str(tmp_path))):
        with pytest.raises(DinoexportError, match=words):
            opened("vits14", "linear", path)


def test_too_many_problems_are_cut(tmp_path: Path) -> None:
    """Of two tensors that are missing and thirty that nobody asked for, twenty."""
    torch.save({f"x{i:02}": torch.zeros(1) for i in range(30)}, tmp_path / "head.pth")
    with pytest.raises(DinoexportError) as caught:
        opened("vits14", "linear", tmp_path / "head.pth")
    _, *lines = caught.value.message.strip().splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["missing"] * 2 + ["unexpected"] * 18
    assert lines[-1] == "  unexpected: x17 (1,)"


def test_where_a_head_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own file, the published one, or synthetic and plain; each tensor is read of its own source."""
    wanted = recipe.load("vits14").with_head("linear")
    model = find("dinov2").model(wanted)
    path = head_file(tmp_path / "head.pth", "vits14", "linear")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    published = WeightFile(url="https://dl.example/head.pth", sha256=digest)
    monkeypatch.setattr(download, "fetch", lambda file, progress: path if file == published else pytest.fail(file.url))

    def open_head(source: str | None, **heads: WeightFile) -> Checkpoint:
        with_heads = wanted.changed(heads=heads)
        return open_checkpoint(model, with_heads, "synthetic:0", head_source=source, progress=silent)

    for found in (open_head(str(path)), open_head(str(path), linear=published), open_head(None, linear=published)):
        assert found.head is not None and found.head.sha256 == digest
        assert found.identity == hashlib.sha256(f"{found.sha256} {digest}".encode()).hexdigest()
        assert found.read("linear_head.bias").tolist() == [0] * 1000
        assert np.array_equal(found.read("norm.weight"), model.synthetic("norm.weight", 0))
    rule = "synthetic:7:linear:[('linear_head.bias', (1000,)), ('linear_head.weight', (1000, 768))]"
    assert open_head("synthetic:07").head == HeadSource(
        source="synthetic:7", sha256=hashlib.sha256(rule.encode()).hexdigest()
    )
    with pytest.raises(DinoexportError, match="The recipe vits14 names no published weights for the head linear"):
        open_head(None)
    for source in ("synthetic-stress:0", "synthetic:", "synthetic:x"):
        with pytest.raises(DinoexportError, match=f"'{source}' is not a synthetic head"):
            open_head(source)
