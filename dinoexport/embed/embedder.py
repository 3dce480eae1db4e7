"""Embed shards with an open bundle: read, decode and prepare on threads, run in batches, write one file."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import dinoexport
from dinoexport import bundle, family, images
from dinoexport.bundle import Manifest
from dinoexport.config.recipe import Frozen, Recipe, parse
from dinoexport.embed import columns as tables
from dinoexport.embed import opening
from dinoexport.embed import plan as plans
from dinoexport.embed.columns import ImageRow
from dinoexport.embed.plan import Done, Plan
from dinoexport.embed.sources import ImageSource, ReadImage, Unusable, open_source
from dinoexport.errors import UsageError
from dinoexport.family import FrontEnd, Model
from dinoexport.spec import Array, Arrays, Graph
from dinoexport.system import files, store

# The number of batches that are decoded ahead of the running one, so that a slow image does not delay it.
_BATCHES_AHEAD = 3
_GROUP_BYTES = 32 << 20
_GROUP_ROWS = 4096
# Memory addresses in an error's text would make two runs differ.
_ADDRESS = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>")
# Called with the number of rows and of failures since the last call.
Tick = Callable[[int, int], None]


class Job(Frozen):
    """The settings of a worker. threads: of its session. decoders: threads that prepare images."""

    bundle: str
    out: str
    images: str
    threads: int
    decoders: int


@dataclass(kw_only=True)
class PreparedImage:
    """An image in progress. inputs: of the graph, for this image; None if it failed, with the reason in `row`."""

    row: ImageRow
    inputs: Arrays | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Prepares items as inputs: by the family's own preparation, with which the bundle was validated."""

    model: Model
    front_end: FrontEnd
    graph: Graph

    def of(self, name: str, read: ReadImage) -> PreparedImage:
        """The image's row and inputs; an error of this image is stored in its row."""
        row = ImageRow(name=name)
        try:
            encoded = read()
            row.sha256 = hashlib.sha256(encoded).hexdigest()
            inputs = self.model.prepare(self.front_end.name, self.front_end.settings, [encoded])
            row.height, row.width = images.size_of(encoded, named=name)
            row.grid = self._grid(inputs)
        except Unusable as problem:
            row.error = str(problem)
        except UsageError as problem:
            row.error = _ADDRESS.sub("it", re.sub(r"^image 1: ", "", problem.message)).rstrip(".")
        except MemoryError:
            row.error = "too large to decode in this machine's memory"
        else:
            return PreparedImage(row=row, inputs=inputs)
        return PreparedImage(row=row)

    def _grid(self, inputs: Arrays) -> tuple[int, int] | None:
        """How many patches the image has, by the steps of the graph's dimensions; None for graphs without them."""
        dims = {dim.name: dim for dim in self.graph.dims}
        sizes: dict[str, int] = {}
        for tensor in self.graph.inputs:
            sizes |= {
                axis: size
                for axis, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
                if isinstance(axis, str)
            }
        if not {"height", "width"} <= sizes.keys() & dims.keys():
            return None
        return (sizes["height"] // dims["height"].step, sizes["width"] // dims["width"].step)


def fingerprint(manifest: Manifest) -> str:
    """The hash of what determines a bundle's outputs: graphs, weights, and the recipe that prepares images."""
    graphs = {graph.file for graph in manifest.graphs}
    graphs |= {f"{name}.data" for name in graphs}
    hashes = sorted((file.name, file.sha256) for file in manifest.files if file.name in graphs)
    return hashlib.sha256(json.dumps([hashes, manifest.recipe], sort_keys=True).encode()).hexdigest()


def model_of(manifest: Manifest) -> Model:
    """The variant that a manifest describes."""
    recipe = parse(Recipe, manifest.recipe, where=f"the recipe in {bundle.MANIFEST}")
    return family.find(manifest.family).model(recipe)


class Embedder:
    """An open bundle, which has just given PyTorch's outputs on one of its cases, and the images' source."""

    def __init__(self, job: Job) -> None:
        folder = Path(job.bundle)
        manifest = bundle.read_manifest(folder)
        self._place = store.open_place(job.out)
        self._plans = plans.read_all(self._place)
        settings = self._plans[0].settings
        if fingerprint(manifest) != settings.model_sha256:
            raise UsageError(
                f"{folder} is not the bundle that the run in {job.out} was planned for.",
                next_step="Give that bundle, or use another folder.",
            )
        self._settings, self._decoders = settings, job.decoders
        self._source: ImageSource = open_source(job.images)
        self._model = model_of(manifest)
        self._candidate, self.runtime = opening.opened(folder, manifest, self._model, job.threads, settings.forms)
        opening.prove(self._candidate, folder, self.runtime)
        front_end = FrontEnd(
            name=settings.front_end,
            graph=front_end_graph(self._model).name,
            meaning="",
            settings=settings.preparation,
        )
        self._prepared = Prepared(model=self._model, front_end=front_end, graph=front_end_graph(self._model))
        self.columns = tables.choose(self._prepared.graph, settings.outputs)

    def embed(
        self,
        plan: Plan,
        shard: int,
        *,
        known_bad: Mapping[str, str] = MappingProxyType({}),
        tick: Tick = lambda _rows, _failed: None,
        begins: Callable[[str], None] | None = None,
    ) -> Done:
        """Writes a shard's part. known_bad: items that killed a decoder, and how. begins: called with each item first.

        With `begins`, items are decoded one at a time on this thread, so that the last item is the one that failed.
        """
        names = plans.items_of(self._place, plan, shard)
        return self._write(plan, shard, self._rows(names, plan, tick, known_bad, begins))

    def again(self, plan: Plan, shard: int, *, tick: Tick = lambda _rows, _failed: None) -> Done:
        """Rewrites a finished shard's part with its failed rows tried again; the other rows stay as they are."""
        import pyarrow.parquet as pq

        local = self._place.local
        draft = self._place.draft(plan.part(shard) + ".before")
        if local is None:
            draft.write_bytes(self._place.read(plan.part(shard)))
        found = pq.ParquetFile(draft if local is None else local / plan.part(shard))

        def groups() -> Iterator[list[ImageRow]]:
            for batch in (found.read_row_group(i) for i in range(found.num_row_groups)):
                rows = [self.stored_row(values) for values in batch.to_pylist()]
                failed = [row.name for row in rows if row.error]
                tried = iter([row for group in self._rows(failed, plan, tick) for row in group])
                yield [next(tried) if row.error else row for row in rows]

        try:
            return self._write(plan, shard, groups())
        finally:
            draft.unlink(missing_ok=True)

    def stored_row(self, values: Mapping[str, object]) -> ImageRow:
        """A row as it was read back from a part."""
        import numpy as np

        arrays: dict[str, Array] = {}
        for column in self.columns:
            if values[column.name] is not None:
                array = np.asarray(values[column.name], self._settings.dtype)
                shape = values.get(f"{column.name}_shape")
                arrays[column.name] = array if shape is None else array.reshape(np.asarray(shape))
        grid = (values.get("grid_height"), values.get("grid_width"))
        return ImageRow(
            name=str(values["path"]),
            sha256=values["sha256"],  # type: ignore[arg-type]
            height=values["height"],  # type: ignore[arg-type]
            width=values["width"],  # type: ignore[arg-type]
            grid=None if None in grid else grid,  # type: ignore[arg-type]
            values=arrays,
            error=str(values["error"] or ""),
        )

    def answers(self, names: Iterable[str]) -> Iterator[ImageRow]:
        """Rows for these items, embedded now with a batch size of one, for `verify` to compare with."""
        for name, read in self._source.readers(list(names)):
            item = self._prepared.of(name, read)
            if item.inputs is not None:
                self._run([item])
            yield item.row

    def _write(self, plan: Plan, shard: int, groups: Iterable[list[ImageRow]]) -> Done:
        schema = tables.schema(self.columns, dtype=self._settings.dtype, metadata=self._metadata(plan))
        draft = self._place.draft(plan.part(shard))
        rows = failed = 0
        try:
            with files.disk_errors(draft.parent):
                writer = tables.Writer(draft, schema, self.columns, dtype=self._settings.dtype)
                for group in groups:
                    if group:
                        writer.write(tables.table(group, self.columns, schema))
                    rows, failed = rows + len(group), failed + sum(bool(row.error) for row in group)
                writer.close()
                done = Done(rows=rows, failed=failed, sha256=files.sha256(draft), size_bytes=draft.stat().st_size)
            self._place.publish(draft, plan.part(shard))
        finally:
            draft.unlink(missing_ok=True)
        self._place.write(plan.done_name(shard), done.model_dump_json().encode())
        return done

    def _metadata(self, plan: Plan) -> dict[str, str]:
        settings = self._settings
        return {
            "dinoexport.model": settings.model_sha256,
            "dinoexport.variant": settings.variant,
            "dinoexport.precision": settings.precision,
            "dinoexport.runtime": self.runtime,
            "dinoexport.preparation": f"{settings.front_end} {settings.preparation}",
            "dinoexport.normalised": "L2" if settings.normalised else "no",
            "dinoexport.plan": plan.sha256,
            "dinoexport.version": dinoexport.__version__,
        }

    def _rows(
        self,
        names: list[str],
        plan: Plan,
        tick: Tick,
        known_bad: Mapping[str, str] = MappingProxyType({}),
        begins: Callable[[str], None] | None = None,
    ) -> Iterator[list[ImageRow]]:
        """The items' rows, a row group at a time. Only the plan and undecodable items determine the batches."""
        size = self._group_rows(plan)
        items = self._items(names, known_bad, begins)
        while group := self._group(items, size, tick):
            yield group

    def _group(self, items: Iterator[PreparedImage], size: int, tick: Tick) -> list[ImageRow]:
        """The next rows, at most `size`, with their values. Images of one size are batched together."""
        rows: list[ImageRow] = []
        told = bad = 0
        waiting: dict[tuple[tuple[int, ...], ...], list[PreparedImage]] = {}
        for item in islice(items, size):
            rows.append(item.row)
            if len(rows) - told == self._settings.batch:
                failed = sum(bool(row.error) for row in rows)
                tick(len(rows) - told, failed - bad)
                told, bad = len(rows), failed
            if item.inputs is None:
                continue
            alike = waiting.setdefault(tuple(array.shape for array in item.inputs.values()), [])
            alike.append(item)
            if len(alike) == self._settings.batch:
                self._run(alike)
                alike.clear()
        for alike in waiting.values():
            if alike:
                self._run(alike)
        tick(len(rows) - told, sum(bool(row.error) for row in rows) - bad)
        return rows

    def _group_rows(self, plan: Plan) -> int:
        batch = plan.settings.batch
        of_memory = _GROUP_BYTES // tables.row_bytes(self.columns, self._prepared.graph, plan.settings.dtype)
        return max(1, min(_GROUP_ROWS, of_memory) // batch) * batch

    def _items(
        self, names: list[str], known_bad: Mapping[str, str], begins: Callable[[str], None] | None
    ) -> Iterator[PreparedImage]:
        """The items in order, decoded ahead on threads."""
        readers = self._source.readers(names)

        def prepared(name: str, read: ReadImage) -> PreparedImage:
            if name in known_bad:
                return PreparedImage(row=ImageRow(name=name, error=known_bad[name]))
            return self._prepared.of(name, read)

        if begins is not None:
            for name, read in readers:
                begins(name)
                yield prepared(name, read)
            return
        ahead = self._settings.batch * _BATCHES_AHEAD
        under_way: deque[Future[PreparedImage]] = deque()
        with ThreadPoolExecutor(self._decoders) as pool:
            try:
                for name, read in readers:
                    under_way.append(pool.submit(prepared, name, read))
                    if len(under_way) > ahead:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                for future in under_way:
                    future.cancel()

    def _run(self, batch: list[PreparedImage]) -> None:
        """Writes the values of a batch into its items' rows."""
        import numpy as np

        assert all(item.inputs is not None for item in batch)
        inputs = [item.inputs for item in batch if item.inputs is not None]
        merged = inputs[0] if len(inputs) == 1 else {n: np.concatenate([i[n] for i in inputs]) for n in inputs[0]}
        answers = self._candidate(merged)
        found = {column.name: column.of(answers) for column in self.columns}
        for place, item in enumerate(batch):
            item.inputs = None
            values = {name: of_batch[place] for name, of_batch in found.items()}
            if not all(np.isfinite(array).all() for array in values.values()):
                item.row.error = "the model's output is not finite"
                continue
            item.row.values = {name: self._kept(item.row.name, name, array) for name, array in values.items()}

    def _kept(self, item: str, name: str, values: Array) -> Array:
        settings = self._settings
        return tables.stored(values, dtype=settings.dtype, normalised=settings.normalised, name=f"{name} of {item}")


def front_end_graph(model: Model) -> Graph:
    """The graph that takes images; raises UsageError for a model that takes none."""
    ends = model.front_ends(None, progress=lambda *_: None)
    graphs = {graph.name: graph for graph in model.graphs}
    of_images = [graphs[end.graph] for end in ends if any(len(t.shape) == 4 for t in graphs[end.graph].inputs)]
    if not of_images:
        takes = "; ".join(f"{tensor.name}: {tensor.meaning}" for tensor in model.graphs[0].inputs)
        raise UsageError(
            f"This bundle's model takes no image files ({takes}), and embed reads image files.",
            next_step="Give a bundle of an image model whose profile contains its evaluation size.",
        )
    return of_images[0]
