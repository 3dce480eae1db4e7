"""The Python front door: the same model, errors and verdict as the command line, without torch."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import dinoexport
from dinoexport import api, bundle, cli, images
from dinoexport.bundle import reference_file
from dinoexport.config import resources
from dinoexport.errors import InputRefused, MissingRequirement, UsageError, ValidationFailed
from dinoexport.images import Preprocessing
from dinoexport.pipeline import build as pipeline
from tests.conftest import DATA, as_if_chosen
from tests.image_inputs import taken

PHOTOGRAPH = resources.folder("validate") / "images" / "rocket.jpg"
OTHER = resources.folder("validate") / "images" / "chelsea.png"
SERVED = str(DATA / "tiny_served.toml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle that takes 224x224, built by the front door itself."""
    out = tmp_path_factory.mktemp("api") / "bundle"
    built = dinoexport.build(SERVED, weights="synthetic:0", out=out)
    assert built.folder == out and built.manifest.verdict == "passed"
    return out


@pytest.fixture
def loaded(folder: Path) -> Iterator[dinoexport.Bundle]:
    with dinoexport.load(folder) as opened:
        yield opened


def exact(folder: Path) -> Any:
    """A case of the reference with PyTorch's answer, photographs aside."""
    return reference_file.read(folder / bundle.REFERENCE).expectations[0]


def test_names_are_loaded_when_used() -> None:
    """`import dinoexport` brings nothing, not even NumPy; unknown names are an AttributeError; dir lists the API."""
    script = (
        "import dinoexport, sys\n"
        "assert not {'numpy', 'pydantic', 'torch', 'dinoexport.api'} & set(sys.modules)\n"
        "assert {'build', 'load', 'Bundle'} <= set(dir(dinoexport))\n"
        "assert dinoexport.load is sys.modules['dinoexport.api'].load\n"
        "try: dinoexport.laod\n"
        "except AttributeError as error: assert 'laod' in str(error)\n"
        "else: raise SystemExit('no error')\n"
        "import dinoexport.cli.build, dinoexport.pipeline.build, dinoexport.validation.validate_bundle\n"
        "assert callable(dinoexport.build), 'a submodule took its place'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_arrays_are_the_graphs_inputs(folder: Path, loaded: dinoexport.Bundle) -> None:
    expectation = exact(folder)
    by_name = loaded(expectation.case.inputs)
    (pixels,) = expectation.case.inputs.values()
    alone = loaded(pixels)
    for name, expected in expectation.outputs.items():
        assert np.array_equal(by_name[name], alone[name])
        assert np.linalg.norm(by_name[name] - expected) < 1e-4 * np.linalg.norm(expected)


def test_images_are_prepared_as_the_validation_does(loaded: dinoexport.Bundle) -> None:
    """A path, its bytes, a Pillow image and the pixels made by hand give the same tokens."""
    pixels = taken(as_bytes=True).of(Preprocessing().prepared(images.load(PHOTOGRAPH))[None])
    expected = loaded(pixels)
    with Image.open(PHOTOGRAPH) as picture:
        for way in (str(PHOTOGRAPH), PHOTOGRAPH, PHOTOGRAPH.read_bytes(), picture, [PHOTOGRAPH], (picture,)):
            found = loaded(way)
            assert all(np.array_equal(found[name], expected[name]) for name in expected), type(way)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "F", "YCbCr"])
def test_pillow_images_of_every_mode_are_what_their_file_is(mode: str, loaded: dinoexport.Bundle) -> None:
    """As RGB, however Pillow holds them; 16-bit grey is scaled, and 32-bit floats have no standard range."""
    source = Image.open(PHOTOGRAPH).resize((300, 260))
    if mode == "I;16":
        picture = Image.fromarray((np.asarray(source.convert("L")).astype(np.uint16)) * 257)
        alike = source.convert("L")
    else:
        picture = source.convert(mode)
        alike = picture.convert("RGB")
    if mode == "F":
        with pytest.raises(InputRefused, match="32-bit grey"):
            loaded(picture)
        return
    stored = BytesIO()
    alike.save(stored, "PNG")
    assert np.array_equal(loaded(picture)["class_token"], loaded(stored.getvalue())["class_token"])


def test_a_turned_photograph_is_turned_back(loaded: dinoexport.Bundle, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(PHOTOGRAPH).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "turned.jpg") as picture:
        assert np.array_equal(loaded(picture)["class_token"], loaded(tmp_path / "turned.jpg")["class_token"])
        lying = Image.fromarray(np.asarray(picture))
        assert not np.array_equal(loaded(picture)["class_token"], loaded(lying)["class_token"])


def test_more_images_than_a_batch_are_run_in_several(folder: Path, loaded: dinoexport.Bundle) -> None:
    (batch,) = [dim for dim in loaded.graphs[0].dims if dim.name == "batch"]
    asked = [PHOTOGRAPH, OTHER] * batch.max
    found = loaded(asked)["class_token"]
    assert found.shape[0] == 2 * batch.max
    first, second = loaded(PHOTOGRAPH)["class_token"][0], loaded(OTHER)["class_token"][0]
    for i, token in enumerate(found):
        own, foreign = (first, second) if i % 2 == 0 else (second, first)
        assert np.linalg.norm(token - own) < 1e-4 * np.linalg.norm(own) < np.linalg.norm(token - foreign)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("no/such/file.jpg", "no/such/file.jpg cannot be read"),
        ([], "no image in an empty sequence"),
        (b"GIF89a", "not a readable image"),
        (3, "A int is not an image"),
        ([np.zeros((224, 224, 3), np.uint8)], "A ndarray is not an image"),
        (np.zeros((1, 3, 224, 224), np.float64), "float64"),
        ({"pixel": np.zeros((1, 3, 224, 224), np.float32)}, "Inputs are"),
    ],
)
def test_what_is_no_input_is_refused(wrong: Any, words: str, loaded: dinoexport.Bundle) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        loaded(wrong)
    assert refused.value.next_step


def test_a_directory_or_a_pipe_is_not_opened(loaded: dinoexport.Bundle, tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path, tmp_path / "pipe.jpg"):
        with pytest.raises(InputRefused, match="not a regular file"):
            loaded(path)


def test_front_end_is_known(loaded: dinoexport.Bundle) -> None:
    with pytest.raises(UsageError, match="Did you mean 'images'") as refused:
        loaded(PHOTOGRAPH, front_end="image")
    assert "images" in refused.value.next_step


def test_threads_reach_the_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    opened = api.cpu.open_for_sizes

    def watched(graphs: Any, way: Any, **options: Any) -> Any:
        asked.append(way.threads)
        return opened(graphs, way, **options)

    monkeypatch.setattr(api.cpu, "open_for_sizes", watched)
    for threads in (0, 1):
        dinoexport.load(folder, threads=threads)(PHOTOGRAPH)
    assert asked == [0, 1]
    with pytest.raises(UsageError, match="threads is -1"):
        dinoexport.load(folder, threads=-1)


def test_the_runtime_is_the_one_that_judged(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from dinoexport.spec import Precision, Runtime, Way

    other = as_if_chosen(folder, tmp_path / "other", Way(runtime=Runtime.OPENVINO, precision=Precision.FP32, threads=1))
    with dinoexport.load(other) as opened:
        assert opened.runs_on.startswith("OpenVINO")
        assert opened(PHOTOGRAPH)["class_token"].shape == (1, 96)
    with dinoexport.load(other, device="cpu") as opened:
        assert opened.validate().report.candidate.startswith("OpenVINO"), "validated is what is called"
    with dinoexport.load(folder) as opened:
        assert opened.runs_on.startswith("ONNX Runtime") and "fp32" in opened.runs_on


def test_devices(folder: Path) -> None:
    with pytest.raises(UsageError, match="no engine for a GPU"):
        dinoexport.load(folder, device="gpu")(PHOTOGRAPH)
    with pytest.raises(UsageError, match="Did you mean 'gpu'"):
        dinoexport.load(folder, device="gpus")  # type: ignore[arg-type]
    assert dinoexport.load(folder, device="cpu")(PHOTOGRAPH)


def test_an_engine_that_cannot_run_here(tmp_path: Path) -> None:
    """Asked for, it is an error; left to dinoexport, the graph answers on the CPU."""
    pytest.importorskip("tensorrt_rtx")
    built = dinoexport.build(SERVED, weights="synthetic:0", precision="fp32", target="rtx4090", out=tmp_path / "b")
    assert built.manifest.engines and built.runs_on.startswith("ONNX Runtime")
    with dinoexport.load(tmp_path / "b", device="gpu") as opened, pytest.raises(MissingRequirement, match="no GPU"):
        opened(PHOTOGRAPH)


def test_a_closed_bundle_is_closed(folder: Path) -> None:
    opened = dinoexport.load(folder)
    with opened as same:
        assert same is opened and opened(PHOTOGRAPH)
    with pytest.raises(UsageError, match="was closed"):
        opened(PHOTOGRAPH)


def test_many_threads_may_ask(loaded: dinoexport.Bundle) -> None:
    expected = loaded(PHOTOGRAPH)["class_token"]
    found: list[Any] = []
    asking = [threading.Thread(target=lambda: found.append(loaded(PHOTOGRAPH)["class_token"])) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(each, expected) for each in found)


def test_validate(folder: Path, loaded: dinoexport.Bundle) -> None:
    validated = loaded.validate()
    assert validated.report.passed and loaded.manifest.verdict == "passed"
    assert "passed" in repr(loaded)


def test_validate_raises_for_other_outputs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoexport.validation import validate_bundle

    real = validate_bundle.validate
    asked: dict[str, Any] = {}

    def failing(*args: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        from dataclasses import replace

        validated = real(*args, **kwargs)
        return replace(validated, report=replace(validated.report, rows=()))

    monkeypatch.setattr(validate_bundle, "validate", failing)
    with pytest.raises(dinoexport.OutputsDiffer, match="does not give PyTorch's outputs") as differ:
        dinoexport.load(folder, device="cpu").validate()
    assert isinstance(differ.value, ValidationFailed) and differ.value.exit_code == 1
    assert not differ.value.validated.report.passed and asked["runtime"] == "onnxruntime"


def test_a_damaged_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(ValidationFailed, match="damaged"):
        dinoexport.load(copy)
    assert dinoexport.load(copy, check=False).manifest.verdict == "passed"
    with pytest.raises(UsageError, match="is not a bundle"):
        dinoexport.load(tmp_path)


def test_a_signature_is_asked_for(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tmp_path / "verify.pem").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ValidationFailed, match="not signed"):
        dinoexport.load(folder, verify=tmp_path / "verify.pem")


def test_build_refuses_as_the_command_line_does(tmp_path: Path) -> None:
    for wrong, words in (
        ({"precision": "fp61"}, "precision 'fp61' is unknown"),
        ({"runtime": "tensorrtx"}, "runtime 'tensorrtx' is unknown"),
        ({"target": "a1000"}, "a1000"),
        ({"weights": tmp_path / "none.pth"}, "none.pth"),
    ):
        with pytest.raises(dinoexport.errors.DinoexportError, match=words):
            dinoexport.build(SERVED, out=tmp_path / "b", **{"weights": "synthetic:0", **wrong})


def test_build_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument reaches the pipeline under its own name."""
    asked: dict[str, Any] = {}

    def request(variant: str, **kwargs: Any) -> str:
        asked.update(kwargs, variant=variant)
        return "request"

    def build(request: str, **kwargs: Any) -> Any:
        asked.update(kwargs)
        raise pipeline.Rejected("no", next_step="", report=None)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "build_request", request)
    monkeypatch.setattr(pipeline, "build", build)

    def progress(*_: Any) -> None: ...

    with pytest.raises(ValidationFailed):
        dinoexport.build(
            "vits14", weights="w.pth", head="linear", head_weights=tmp_path / "h.pth", precision="auto",
            target="a100", runtime="tensorrt", profiles=["latency"],
            preset="max", out=str(tmp_path), force=True, keep_rejected=True, reference="hub", progress=progress,
        )  # fmt: skip
    assert asked == {
        "variant": "vits14", "weights": "w.pth", "head": "linear", "head_weights": str(tmp_path / "h.pth"),
        "prefix": None, "precision": "auto", "target": "a100", "runtime": "tensorrt",
        "engine_choices": {"profiles": ("latency",), "preset": "max"}, "out": tmp_path, "judge_code": "hub",
        "force": True, "keep_rejected": True, "progress": progress,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "function", "other"),
    [
        # What only the command line prints or asks for; a key is opened with `bundle.signing`.
        ("build", dinoexport.build, {"profile": "profiles", "as_json": "", "dry_run": "", "sign": ""}),
        # `load` has the runtime's place, `device`, and verifies; growth and pages are for people to read.
        (
            "validate", dinoexport.Bundle.validate,
            {"bundle": "self", "runtime": "", "verify": "", "trust_plan": "", "page": "", "explain": "", "sign": "",
             "as_json": ""},
        ),
    ],
)  # fmt: skip
def test_what_a_command_takes_its_function_takes(verb: str, function: Any, other: dict[str, str]) -> None:
    """An option that a command gets must be decided about here too."""
    group: Any = typer.main.get_command(cli.app)
    options = [other.get(parameter.name, parameter.name) for parameter in group.commands[verb].params]
    assert len(options) > 8
    assert [name for name in options if name and name not in inspect.signature(function).parameters] == []


def test_no_torch_no_onnx_no_network(folder: Path) -> None:
    """A process in which importing torch or onnx, or connecting, is an error loads, runs and validates."""
    script = (
        "import socket, sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'safetensors'): sys.modules[name] = None\n"
        "socket.socket.connect = None\n"
        "import dinoexport\n"
        f"with dinoexport.load({str(folder)!r}) as bundle:\n"
        f"    assert bundle({str(PHOTOGRAPH)!r})['class_token'].ndim == 2\n"
        "    assert bundle.validate().report.passed\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_onnx_runtime_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The documented lines, on a smaller model and image; their tokens are the bundle's."""
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    (example,) = re.findall(r"```python\n(import numpy as np\nimport onnxruntime\n.*?)```", page, flags=re.DOTALL)
    assert "dinoexport" not in example.replace("bundles/vits14-fp32-cpu", "") and len(example.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photograph.jpg").write_bytes(PHOTOGRAPH.read_bytes())
    built = dinoexport.build(str(DATA / "tiny_swiglu.toml"), weights="synthetic:0", out="bundles/vits14-fp32-cpu")
    found: dict[str, Any] = {}
    exec(example.replace("518", "56"), found)
    assert capsys.readouterr().out == "(1, 96) (1, 16, 96)\n"
    assert np.array_equal(found["class_token"], built(found["pixels"].transpose(2, 0, 1)[None])["class_token"])
