"""A page about a user's own images: every measure, and pictures of the images with different results.

It is written to the path that the user gives, never into the bundle, because the images belong to the user.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path

from dinoexport import bundle, family
from dinoexport.config.recipe import Recipe, parse
from dinoexport.errors import UsageError, require
from dinoexport.spec import Picture, Progress
from dinoexport.system import files
from dinoexport.validation import user_files
from dinoexport.validation.downstream import Agreement
from dinoexport.validation.validate_bundle import Validated

TEMPLATE = Path(__file__).parent / "templates" / "mismatches.html.jinja"
# Marks a page that dinoexport wrote, so that a later page may replace it.
_OURS = b'<meta name="generator" content="dinoexport">'
# Enough to see what kind of item differs; no browser opens a page of ten thousand pictures.
_ITEMS_MAX = 24
_NEIGHBOURS_MAX = 3


def check(path: Path, images: Path | None) -> None:
    """Raises, before a long run, any error that would prevent writing the page at its end."""
    require("export", "jinja2")
    if images is None:
        raise UsageError("--page shows images that differ, and none are given.", next_step="Add --images DIR.")
    files.check_output(path, ours=_OURS)


def write(path: Path, validated: Validated, images: Path, *, progress: Progress) -> None:
    """Writes the page by rename; the images it shows are read again from `images`."""
    found = validated.aggregate.agreement if validated.aggregate else None
    pictures: dict[str, Picture] = {}
    if found is not None:
        recipe = parse(Recipe, validated.manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
        model = family.find(validated.manifest.family).model(recipe)
        wanted = frozenset(_shown(found))
        if model.uses and wanted:
            cases = user_files.usable(model, images, [], progress, only=wanted)
            pictures = {case.name: model.uses.thumbnail(case.inputs) for case in cases}
    content = render(validated, found, pictures).encode(errors="backslashreplace")  # file names may not be UTF-8
    files.write_output(path, content, ours=_OURS)


def _shown(found: Agreement) -> Iterator[str]:
    for measure in found.measures:
        for differs in measure.differs[:_ITEMS_MAX]:
            yield from (differs.item, *differs.lost[:_NEIGHBOURS_MAX], *differs.instead[:_NEIGHBOURS_MAX])


def render(validated: Validated, found: Agreement | None, pictures: Mapping[str, Picture]) -> str:
    """The page as HTML; `pictures` by the names of items."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["data_uri"] = _data_uri
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=f"{validated.manifest.variant}, {validated.manifest.precision}",
        report=validated.report,
        aggregate=validated.aggregate,
        agreement=found,
        skipped=validated.skipped,
        pictures=pictures,
        items_max=_ITEMS_MAX,
        neighbours_max=_NEIGHBOURS_MAX,
    )


def _data_uri(picture: Picture) -> str:
    return f"data:{picture.media_type};base64,{b64encode(picture.data).decode()}"
