"""What verbs ask for, and what they refuse first, with stand-ins of the work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dinoexport import cli
from dinoexport.cli import embed, formatting
from dinoexport.embed.run import State
from dinoexport.spec import Precision


def test_an_engines_lines() -> None:
    facts = {
        "file": "model.plan", "compute_capabilities": ("8.9", "12.0"), "runtime": "tensorrt", "runtime_version": "11.2",
        "precision": Precision.FP32, "size_bytes": 2_250_001, "executed": "no", "attentions": 12,
        "fused_attentions": 11, "caution": "",
    }  # fmt: skip
    manifest: Any = SimpleNamespace(engines=(SimpleNamespace(**facts),))
    assert formatting.engine_lines(manifest, "no GPU here")[:3] == [
        "Engine: model.plan for SM 8.9, 12.0, tensorrt 11.2, fp32, 2.3 MB. Built; executed: no.",
        "        no GPU here",
        "        warning: attention is fused in 11 of 12 places; TensorRT fuses it in fp16 only.",
    ]


@pytest.mark.parametrize(
    ("words", "answers", "sizes"),
    [
        ([], (), ()),
        (["--answers", "a", "--answers", "b", "--size", "8x8"], ["a", "b"], ["8x8"]),
    ],
)
def test_deploy_asks_for_what_was_given(
    words: list[str], answers: Any, sizes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def deploy(folder: Path, to: Path, *, progress: Any, **how: Any) -> None:
        asked.append((folder, to, how["answers"], how["sizes"]))
        raise OSError(5, "that is all")

    monkeypatch.setattr("dinoexport.serving.triton.model_repository.deploy", deploy)
    shown = CliRunner().invoke(cli.app, ["deploy", str(tmp_path), "--to", str(tmp_path / "models"), *words])
    assert shown.exit_code == 4 and "that is all" in shown.stderr
    assert asked == [(tmp_path, tmp_path / "models", answers, sizes)]


@pytest.mark.parametrize(("remote", "signs"), [(False, False), (False, True), (True, False), (True, True)])
def test_validate_records_its_result_in_a_folder_and_signs_nothing_elsewhere(
    remote: bool, signs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def validate(_folder: Path, *, record: bool, **_: Any) -> None:
        asked.append(record)
        raise OSError(5, "that is all")

    monkeypatch.setattr("dinoexport.validation.validate_bundle.validate", validate)
    monkeypatch.setattr("dinoexport.bundle.signing.open_signer", lambda *_, **__: "a signer")
    monkeypatch.setattr("dinoexport.bundle.signing.signed_by", lambda _folder: None)
    monkeypatch.setattr("dinoexport.cli.inspect.folder_of", lambda _bundle: tmp_path)
    bundle = "s3://bucket/bundle" if remote else str(tmp_path)
    (tmp_path / "key.pem").touch()
    sign = ["--sign", str(tmp_path / "key.pem")] if signs else []
    shown = CliRunner().invoke(cli.app, ["validate", bundle, *sign])
    if remote and signs:
        assert shown.exit_code == 2 and "is a URL, and a bundle cannot be signed there" in shown.stderr and not asked
    else:
        assert shown.exit_code == 4 and asked == [not remote]


def test_progress_is_said_at_once_and_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A clock that begins with the machine: the first is said ten seconds after that at the earliest."""
    now = [10.5]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    state: Any = State(rows=1, rows_total=9, failed=0, shards=1, shards_total=3, rate=1.0, left_s=None)
    said = []
    with embed._watching(True) as watch:
        for at in (10.5, 20.25, 20.5):
            now[0] = at
            watch(state)
            said.append(bool(capsys.readouterr().err))
    assert said == [True, False, True]
