"""Find DINOv2 backbones in a checkpoint, however their tensors' names are wrapped.

A wrapper puts segments before a name (`module.`, `teacher.backbone.`), between its parts (`blocks._orig_mod.0.`, the
chunks of upstream's training) or after it. A tensor is therefore recognised by the parts of its own name, in order;
tensors with the same segments before and after belong together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dinoexport.errors import WeightsError
from dinoexport.family import Shapes

_LINEAR = ("weight", "bias")
_OUTSIDE = (
    "cls_token", "pos_embed", "register_tokens", "reg_token", "mask_token",
    *(f"{module}.{part}" for module in ("patch_embed.proj", "norm") for part in _LINEAR),
)  # fmt: skip
_INSIDE = (
    "ls1.gamma", "ls2.gamma",
    *(
        f"{module}.{part}"
        for module in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3")
        for part in _LINEAR
    ),
)  # fmt: skip
_HF_OUTSIDE = (
    "embeddings.cls_token", "embeddings.mask_token", "embeddings.register_tokens", "embeddings.position_embeddings",
    *(f"{module}.{part}" for module in ("embeddings.patch_embeddings.projection", "layernorm") for part in _LINEAR),
)  # fmt: skip
_HF_INSIDE = (
    "layer_scale1.lambda1", "layer_scale2.lambda1",
    *(
        f"{module}.{part}"
        for module in (
            "norm1", "norm2", "attention.output.dense", "mlp.fc1", "mlp.fc2", "mlp.weights_in", "mlp.weights_out",
            *(f"attention.attention.{part}" for part in ("query", "key", "value")),
        )
        for part in _LINEAR
    ),
)  # fmt: skip
# A backbone must have these tensors.
_CORE = {
    "official": ("patch_embed.proj.weight", "pos_embed"),
    "hugging face": ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"),
}
# Tensors at the top of a backbone that take part in its arithmetic: with one of them it is another architecture.
_PART_OF_IT = re.compile(
    r"^(blocks|patch_embed|norm|cls_token|pos_embed|encoder|embeddings|layernorm|norm_pre|pre_norm|ln_pre|dist_token|"
    r"storage_tokens|rope\w*|rel_pos\w*|relative_position\w*|local_cls_norm|cls_norm)(\.|$)"
)
_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Tensors that belong together. names: layout's own name -> the file's."""

    layout: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    names: dict[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """The prefix of its names, in the form of `--prefix`."""
        return ".".join(self.before)

    @property
    def is_whole(self) -> bool:
        """Whether it could be a backbone: patches, positions and a block."""
        return all(name in self.names for name in _CORE[self.layout]) and any(
            name.startswith(("blocks.", "encoder.layer.")) for name in self.names
        )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        blocks = (re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name) for name in self.names)
        return 1 + max((int(block[1]) for block in blocks if block), default=-1)

    def width(self, found: Shapes) -> int:
        """The width of its tokens."""
        shape = found[self.names[_CORE[self.layout][0]]]
        return shape[0] if shape else 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """The chosen backbone. strays: tensors of the file that are part of it although no DINOv2 has them.

    notes: a sentence for each choice and each omission.
    """

    backbone: Backbone
    strays: tuple[str, ...]
    notes: tuple[str, ...]


def backbones(found: Shapes) -> list[Backbone]:
    """Every group of tensors that could be a backbone, else the one with the most tensors."""
    groups: dict[tuple[str, tuple[str, ...], tuple[str, ...]], Backbone] = {}
    # Names without foreign segments come first; another name for the same tensor is a stray.
    matches = [(name, match) for name in found if (match := _match(tuple(name.split(".")))) is not None]
    for name, (layout, before, own, between, after) in sorted(matches, key=lambda item: len(item[1][3])):
        del between
        group = groups.setdefault((layout, before, after), Backbone(layout=layout, before=before, after=after))
        group.names.setdefault(own, name)
    whole = [group for group in groups.values() if group.is_whole]
    return whole or sorted(groups.values(), key=lambda group: -len(group.names))[:1]


def search(found: Shapes, *, width: int | None = None, depth: int | None = None) -> Found | None:
    """The one backbone in `found`; None if there is none.

    width and depth: the requested model's, which decide between several. Of a teacher and a student, the teacher is
    chosen, as upstream evaluates and publishes it. Raises WeightsError that lists backbones if the choice is unclear.
    """
    candidates = backbones(found)
    if not candidates:
        return None
    chosen = candidates
    if len(chosen) > 1:
        chosen = [one for one in candidates if one.width(found) == width and one.depth == depth] or candidates
    teachers = [one for one in chosen if "teacher" in one.before]
    students = [one for one in chosen if "student" in one.before]
    if len(teachers) == 1 and len(students) == len(chosen) - 1:
        chosen = teachers
    if len(chosen) > 1:
        listed = ", ".join(repr(one.prefix) for one in chosen)
        raise WeightsError(
            f"The checkpoint holds {len(chosen)} backbones, under {listed}.",
            next_step=f"Choose one with --prefix, as --prefix {next((one.prefix for one in chosen if one.prefix), '')}",
        )
    return _chosen(chosen[0], candidates, found)


def _chosen(backbone: Backbone, candidates: Sequence[Backbone], found: Shapes) -> Found:
    taken = set(backbone.names.values())
    inside = f"{backbone.prefix}." if backbone.prefix else ""
    rest = [name for name in found if name not in taken]
    strays = tuple(n for n in rest if n.startswith(inside) and _PART_OF_IT.match(n.removeprefix(inside)))
    left_out = [name for name in rest if name not in strays]
    notes = []
    if backbone.prefix:
        others = [other for other in candidates if other is not backbone]
        beside = f", not the one under {', '.join(repr(o.prefix) for o in others)}" if others else ""
        notes.append(f"The backbone under {backbone.prefix!r} was chosen{beside}.")
    if "student" in backbone.before:
        notes.append("It is the student; upstream evaluates and publishes the teacher.")
    if left_out:
        more = f" and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
        few = ", ".join(left_out[:_LISTED])
        notes.append(f"Left out, because they are not part of it: {few}{more}.")
    return Found(backbone=backbone, strays=strays, notes=tuple(notes))


_Match = tuple[str, tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]


def _match(segments: tuple[str, ...]) -> _Match | None:
    """(layout, segments before, the layout's own name, segments between, segments after); None for other tensors.

    Of several ways to read a name the one with the fewest foreign segments between its parts counts.
    """
    ways = [
        way
        for start in range(len(segments))
        for way in (_of_block(segments, start), _of_outside(segments, start))
        if way is not None
    ]
    return min(ways, key=lambda way: (len(way[3]), -len(way[2].split("."))), default=None)


_BY_FIRST: dict[str, dict[str, list[tuple[str, ...]]]] = {}
for _layout, _names in (("official", _OUTSIDE), ("hugging face", _HF_OUTSIDE)):
    for _name in _names:
        _parts = tuple(_name.split("."))
        _BY_FIRST.setdefault(_parts[0], {}).setdefault(_layout, []).append(_parts)


def _of_outside(segments: tuple[str, ...], start: int) -> _Match | None:
    for layout, names in _BY_FIRST.get(segments[start], {}).items():
        for parts in names:
            rest = _rest(segments[start:], parts)
            if rest is not None:
                return layout, segments[:start], ".".join(parts), rest[0], rest[1]
    return None


_INSIDES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "official": tuple(tuple(name.split(".")) for name in _INSIDE),
    "hugging face": tuple(tuple(name.split(".")) for name in _HF_INSIDE),
}


def _of_block(segments: tuple[str, ...], start: int) -> _Match | None:
    """`blocks.I.…` or `encoder.layer.I.…`; of two numbers, chunk and block, the last is the block's."""
    if segments[start] == "blocks":
        layout, stem, at = "official", "blocks", start + 1
    elif segments[start] == "encoder" and "layer" in segments[start:]:
        layout, stem, at = "hugging face", "encoder.layer", segments.index("layer", start) + 1
    else:
        return None
    for begin in range(at + 1, len(segments)):
        numbers = [segment for segment in segments[at:begin] if segment.isdecimal() and segment.isascii()]
        if not 1 <= len(numbers) <= 2:
            continue
        for parts in _INSIDES[layout]:
            rest = _rest(segments[begin:], parts) if segments[begin] == parts[0] else None
            if rest is not None:
                noise = tuple(segment for segment in segments[at:begin] if segment not in numbers)
                return layout, segments[:start], f"{stem}.{numbers[-1]}.{'.'.join(parts)}", noise + rest[0], rest[1]
    return None


def _rest(segments: tuple[str, ...], parts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(segments between `parts`, segments after them) where `parts` are among `segments` in their order, else None."""
    between: list[str] = []
    at = 0
    for part in parts:
        try:
            found_at = segments.index(part, at)
        except ValueError:
            return None
        between += segments[at:found_at]
        at = found_at + 1
    return tuple(between), segments[at:]
