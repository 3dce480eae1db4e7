"""The facts of a served model: one parameter of its Triton configuration, which its server and its clients read.

With them a client raises the server's own error before sending, without the bundle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from dinoexport.bundle import GraphFacts
from dinoexport.config.recipe import Frozen, Name
from dinoexport.errors import UsageError
from dinoexport.runtime import cpu
from dinoexport.spec import Precision, Way

PARAMETER = "dinoexport"
# The dtype of an encoded item in the ensemble of a front end.
ENCODED = "encoded"


class Served(Frozen):
    """The facts of one Triton model.

    name: its deployed name; several Triton models share one. role: `graph` runs the graph, `prepare` turns
    encoded files into its inputs, `finish` its outputs into other forms, `front_end` is the ensemble of them, `text`
    writes with a decoder. settings: see `family.FrontEnd`. answers: what a front end gives, where that is not what the
    graph gives. way: how the Python backend runs the graph. tokenizer: its file, of a text model.
    """

    name: Name
    version: int
    role: Literal["graph", "prepare", "finish", "front_end", "text"]
    variant: str
    family: Name
    precision: Precision
    recipe: dict[str, Any]
    graph: GraphFacts
    way: Way = cpu.PLAIN  # for models deployed before this field existed
    front_end: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    answers: GraphFacts | None = None
    tokenizer: str = ""

    @classmethod
    def of_text(cls, config: str) -> Served | None:
        """The facts in a config.pbtxt that dinoexport wrote (`config.to_text`); None if there are none to be read."""
        found = re.search(rf'key: "{PARAMETER}"\n *value {{\n *string_value: (".*")\n', config)
        try:
            return cls.model_validate_json(json.loads(found[1])) if found else None
        except (ValidationError, ValueError):
            return None

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Served | None:
        """The facts in a model's configuration (Triton's JSON form); None if dinoexport did not deploy the model."""
        parameters = config.get("parameters", {})
        if not isinstance(parameters, dict) or PARAMETER not in parameters:
            return None
        try:
            return cls.model_validate_json(parameters[PARAMETER]["string_value"])
        except (ValidationError, KeyError, TypeError, ValueError):
            raise UsageError(
                f"The served model {config.get('name')!r} was deployed by another version of dinoexport.",
                next_step="Deploy its bundle again with this one.",
            ) from None
