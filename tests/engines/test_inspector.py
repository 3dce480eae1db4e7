"""What the process that opens a classic plan says of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.engines import inspector
from dinoexport.spec import Runtime
from dinoexport.system import subprocess_job


def opened(**members: Any) -> Any:
    facts = json.dumps({"Layers": ["a layer"]})
    looking = SimpleNamespace(get_engine_information=lambda form: facts if form == "as JSON" else "")
    return SimpleNamespace(create_engine_inspector=lambda: looking, device_memory_size_v2=7, **members)


def raising() -> int:
    raise TypeError("cannot create weak reference to 'int' object")


@pytest.mark.parametrize(
    ("members", "weight_bytes"), [({"get_engine_stat": lambda: 5}, 5), ({"get_engine_stat": raising}, None), ({}, None)]
)
def test_a_plan_is_reported_in_one_line(
    members: dict[str, Any], weight_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def open_plan(*words: Any, **settings: Any) -> Any:
        asked.append((words, settings))
        return SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="as JSON")), opened(**members), None

    monkeypatch.setattr(inspector, "open_plan", open_plan)
    read, write = os.pipe()
    monkeypatch.setenv(subprocess_job.REPORT, str(write))
    inspector.main({"engine": "folder/model.plan", "host_code": True})
    with os.fdopen(read) as report:
        said = report.read()
    expected = {"said": {"scratch_bytes": 7, "weight_bytes": weight_bytes, "layers": ["a layer"]}}
    assert json.loads(said) == expected and said.endswith("}\n") and said.count("\n") == 1
    assert asked == [((Path("folder/model.plan"), Runtime.TENSORRT), {"host_code": True})]
