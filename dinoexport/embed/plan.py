"""The plan of a run: items, settings and shards. It is written before the first row and never changed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import Field, ValidationError

from dinoexport.config.recipe import Frozen, Sha256
from dinoexport.embed.sources import ImageSource, Item
from dinoexport.errors import UsageError, ValidationFailed
from dinoexport.spec import Progress
from dinoexport.system.store import LocalPlace, Place

FOLDER = "_plan"
SUCCESS = "_SUCCESS.json"
ROWS_MAX = 50_000
_FILE_BYTES = 128 << 20
_LEAST_ROWS = 64
_SHARDS_MAX = 100_000
# The number of items in memory before they are distributed to the shards' lists.
_SHARED_OUT = 200_000


class Settings(Frozen):
    """What determines a row's content. images: as given; a path is made absolute.

    forms: sizes, batch first, whose batches run in a form of the graph compiled for that size alone.
    """

    images: str
    model_sha256: Sha256
    variant: str
    precision: str
    front_end: str
    preparation: dict[str, Any]
    outputs: tuple[str, ...]
    dtype: Literal["float32", "float16"]
    normalised: bool
    batch: int = Field(ge=1)
    forms: tuple[str, ...] = ()


class Plan(Frozen):
    """A listing divided into shards. generation: 0, or the extension's number. lists: where their items are listed."""

    version: Literal[1] = 1
    generation: int = Field(ge=0)
    shards: int = Field(ge=1, le=_SHARDS_MAX)
    items: int = Field(ge=0)
    image_bytes: int = Field(ge=0)
    listing_sha256: Sha256
    lists: str = Field(pattern=r"^\d+-[0-9a-f]{12}$")
    settings: Settings

    def part(self, shard: int) -> str:
        """The file that holds a shard's rows."""
        name = f"part-{shard:05d}-of-{self.shards:05d}.parquet"
        return name if not self.generation else f"extension-{self.generation}-{name}"

    def list_name(self, shard: int) -> str:
        """The file that lists a shard's items."""
        return f"{FOLDER}/{self.lists}/{shard:05d}.jsonl"

    def done_name(self, shard: int) -> str:
        """The file with the facts of a finished shard."""
        return f"{FOLDER}/{self.lists}/{shard:05d}.done.json"

    @property
    def sha256(self) -> str:
        """The plan's own hash, which each part stores."""
        return hashlib.sha256(self.model_dump_json(exclude={"settings": {"images"}}).encode()).hexdigest()


class Done(Frozen):
    """The facts of a finished shard."""

    rows: int
    failed: int
    sha256: Sha256
    size_bytes: int


def items_of(place: Place, plan: Plan, shard: int) -> list[str]:
    """The names of a shard's items, in the order of its rows."""
    try:
        raw = place.read(plan.list_name(shard)).decode()
        return [str(json.loads(line)[0]) for line in raw.splitlines()]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        raise ValidationFailed(
            f"{place}: {plan.list_name(shard)} is missing or damaged.", next_step="Start again in another folder."
        ) from None


def read_all(place: Place) -> tuple[Plan, ...]:
    """The plan and its extensions in order; empty if there is none."""
    found: list[Plan] = []
    while True:
        try:
            raw = place.read(f"{FOLDER}/{len(found)}.json")
        except (FileNotFoundError, NotADirectoryError):
            return tuple(found)
        try:
            found.append(Plan.model_validate_json(raw))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValidationFailed(
                f"{place}/{FOLDER}/{len(found)}.json is damaged, or of another version: {first['msg']}.",
                next_step="Begin again in another folder.",
            ) from None


def refuse_foreign(place: LocalPlace) -> None:
    """Raises UsageError for a folder without a plan that holds anything but a listing that was not finished."""
    foreign = sorted(name for name in place.names() if name != FOLDER)
    if foreign:
        raise UsageError(
            f"{place} holds files that no run of embed wrote: {', '.join(foreign[:5])}.",
            next_step="Choose another --out, or move them away.",
        )


def make(
    source: ImageSource,
    place: Place,
    settings: Settings,
    *,
    before: tuple[Plan, ...],
    shards: int | None,
    workers: int,
    row_bytes: int,
    progress: Progress,
) -> Plan | None:
    """Lists the source and writes the next plan; None if all items are already in the plans `before`.

    Only a part of the listing is in memory, however long it is. If another process has written a plan in the
    meantime, that plan is returned.
    """
    generation = len(before)
    with TemporaryDirectory() as scratch:
        listing = Path(scratch) / "listing.jsonl"
        found = _listed(source.items(), listing, progress)
        for i, plan in enumerate(before):
            listing, found = _without(listing, plan, place, Path(scratch) / str(i))
        items, image_bytes, digest = found
        if not items:
            return None
        count = shards or _count(items, row_bytes, workers)
        named = hashlib.sha256(f"{count} {digest} {settings.model_dump_json()}".encode()).hexdigest()[:12]
        plan = Plan(
            generation=generation,
            shards=count,
            items=items,
            image_bytes=image_bytes,
            listing_sha256=digest,
            lists=f"{generation}-{named}",
            settings=settings,
        )
        for shard, path in enumerate(_shared_out(_read_lines(listing), count, Path(scratch) / "shards")):
            place.write(plan.list_name(shard), path.read_bytes() if path.exists() else b"")
            progress("writing the plan", shard + 1, count)
    try:
        place.write(f"{FOLDER}/{generation}.json", plan.model_dump_json(indent=1).encode(), new=True)
    except FileExistsError:
        theirs = read_all(place)[generation]
        if theirs.lists != plan.lists:
            for shard in range(count):
                place.remove(plan.list_name(shard))
        return theirs
    return plan


def listing_hash(source: ImageSource, progress: Progress) -> str:
    """The `Plan.listing_sha256` that a first plan would have now."""
    with TemporaryDirectory() as scratch:
        return _listed(source.items(), Path(scratch) / "listing.jsonl", progress)[2]


def refuse_others(plan: Plan, wanted: Settings, shards: int | None, place: Place) -> None:
    """Raises UsageError that names the differences if the run at `place` is not the requested one."""
    theirs, ours = plan.settings.model_dump(), wanted.model_dump()
    differing = [f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
    if shards is not None and plan.generation == 0 and shards != plan.shards:
        differing.append(f"{plan.shards} shards, not {shards}")
    if differing:
        raise UsageError(
            f"{place} holds another run: it has {'; '.join(differing)}.",
            next_step="Choose another --out, or use the options of that run.",
        )


def _count(items: int, row_bytes: int, workers: int) -> int:
    """Shards of at most 128 MB and 50,000 rows; and several for each worker, so that all end at about the same time."""
    wanted = max(math.ceil(items / ROWS_MAX), math.ceil(items * row_bytes / _FILE_BYTES))
    return min(_SHARDS_MAX, max(wanted, min(math.ceil(items / _LEAST_ROWS), 8 * workers)))


def shard_of(key: str, shards: int) -> int:
    """The shard of items with `key`, independent of other items and of their order."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % shards


Listing = tuple[int, int, str]  # number of items, their bytes, hash of the listing


def _listed(items: Iterable[Item], listing: Path, progress: Progress) -> Listing:
    """Writes the listing to a file. The hash covers only the names, because a store may report other sizes later."""
    count, image_bytes, digest = 0, 0, hashlib.sha256()
    with listing.open("w", encoding="utf-8") as file:
        for item in items:
            count, image_bytes = count + 1, image_bytes + item.size_bytes
            digest.update(json.dumps([item.name, item.key]).encode())
            file.write(json.dumps([item.name, item.size_bytes, item.key]) + "\n")
            if count % 10_000 == 0:
                progress("listing images", count, 0)
    return count, image_bytes, digest.hexdigest()


def _read_lines(listing: Path) -> Iterator[tuple[str, str]]:
    """(the item's key, its line) of each item in a listing."""
    with listing.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)[2], line


def _shared_out(lines: Iterable[tuple[str, str]], count: int, folder: Path) -> list[Path]:
    """A file for each shard, its lines in the listing's order; a shard without items has no file."""
    folder.mkdir()
    paths = [folder / str(shard) for shard in range(count)]
    held: dict[int, list[str]] = {}

    def flush() -> None:
        for shard, some in held.items():
            with paths[shard].open("a", encoding="utf-8") as file:
                file.writelines(some)
        held.clear()

    for number, (key, line) in enumerate(lines, start=1):
        held.setdefault(shard_of(key, count), []).append(line)
        if number % _SHARED_OUT == 0:
            flush()
    flush()
    return paths


def _without(listing: Path, plan: Plan, place: Place, folder: Path) -> tuple[Path, Listing]:
    """The listing without the items of `plan`, shard by shard: only one shard's names are in memory."""
    kept = listing.with_name(f"without-{plan.generation}.jsonl")
    parts = _shared_out(_read_lines(listing), plan.shards, folder)

    def remaining(exits: ExitStack) -> Iterator[Item]:
        for shard, part in enumerate(parts):
            if part.exists():
                known = set(items_of(place, plan, shard))
                for line in exits.enter_context(part.open(encoding="utf-8")):
                    name, size_bytes, key = json.loads(line)
                    if name not in known:
                        yield Item(name=name, size_bytes=size_bytes, key=key)
                exits.close()

    with ExitStack() as exits:
        return kept, _listed(remaining(exits), kept, lambda *_: None)


def success(place: Place, plans: tuple[Plan, ...], done: Mapping[str, Done]) -> bytes:
    """`_SUCCESS.json`: what is in the folder now that every shard is done."""
    content = {
        "rows": sum(part.rows for part in done.values()),
        "failed": sum(part.failed for part in done.values()),
        "plans": [plan.sha256 for plan in plans],
        "parts": {name: part.model_dump() for name, part in sorted(done.items())},
    }
    raw = (json.dumps(content, indent=1) + "\n").encode()
    place.write(SUCCESS, raw)
    return raw
