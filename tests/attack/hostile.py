"""Command lines on hostile input, made by chance from a seed: each in a folder of its own, with what it must not do."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dinoexport import bundle

URL = "http://127.0.0.1:9"
TEXTS = (
    "", " ", "-", "--", "\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe", "a\nerror: b", "caf\udce9", "9" * 5000, "1e309",
    "nan",
    "../../../etc/passwd", "/", "~", "%s%n", "'; touch PWNED;'", "$(touch PWNED)", "\ud800", "http://[::1",
    "x" * 4000, "0x10",
    "-1", "٣", "\x7f\x9b2J", "a\u2066b", "s3://bucket/models", "synthetic:", "synthetic:" + "9" * 30,
    "pypi:x==1/..", "{}", "null", "1/0", "0/0",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, float("inf"), "", "x" * 1000, "\x1b[31m", [], {}, [[]], {"a": {}},
    [None], "../x", "/etc/passwd", 0.5,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What is right, and is spoilt: a tiny bundle that passed, its recipe, weights of its shape, an image, a key."""

    bundle: Path
    recipe: Path
    weights: tuple[Path, ...]
    images: Path
    key: Path


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A command line. refused: whether it must not end in success. victim: what must stay as it is."""

    kind: str
    arguments: tuple[str, ...]
    refused: bool
    victim: Path | None = None


Maker = Callable[[Kit, Path, random.Random], Attempt]


def attempts(kit: Kit, scratch: Path, rng: random.Random, kinds: dict[str, Maker] | None = None) -> Iterator[Attempt]:
    """Attempts without an end, every kind in turn, each with an empty folder `scratch`/here to lie in."""
    makers = KINDS if kinds is None else kinds
    while True:
        for make in makers.values():
            here = scratch / "here"
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir(parents=True)
            yield make(kit, here, rng)


# ---- files that are none ----


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(path))
    return path


def _link(target: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.symlink_to(target)
        return path

    return make


def _file(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def _sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return path


def _odd_name(path: Path) -> Path:
    odd = path.with_name("caf\udce9\x1b[2J")
    odd.mkdir()
    return odd


STRANGE: dict[str, Callable[[Path], Path]] = {
    "a pipe": _pipe,
    "a device": lambda _: Path("/dev/zero"),
    "a full device": lambda _: Path("/dev/full"),
    "a link to a device": _link("/dev/zero"),
    "a link to nothing": _link("nowhere"),
    "a link to itself": _link("thing"),
    "nothing": lambda path: path,
    "an empty file": _file(b""),
    "noise": _file(bytes(range(256)) * 40),
    "text": _file(b"secret = 1\n"),
    "no UTF-8": _file(b'name = "caf\xe9"\n'),
    "a terabyte": _sparse,
    "a folder of an odd name": _odd_name,
    "a name that is too long": lambda path: path.with_name("x" * 4000),
    "a path that is too long": lambda path: path.joinpath(*(["y" * 200] * 30)),
}
# Where a path may stand: what reads it must refuse every one of those.
PLACES: tuple[tuple[str, ...], ...] = (
    ("validate", "X"), ("inspect", "X"), ("report", "X"), ("diff", "B", "X"), ("diff", "X", "B"), ("bench", "X"),
    ("deploy", "X", "--to", "models"), ("rollback", "X", "tiny"), ("export", "X", "--out", "out"),
    ("validate", "B", "--images", "I", "--weights", "X"), ("validate", "B", "--verify", "X"),
    ("validate", "B", "--sign", "X"),
    ("validate", "B", "--images", "X"), ("fit", "B", "--images", "X"), ("embed", "X", "--images", "I", "--out", "out"),
    ("generate", "X", "hello"), ("check", URL, "B", "--headers", "X"),
    ("check", URL.replace("http", "https"), "B", "--ca", "X"),
    ("deploy", "B", "--to", "models", "--samples", "X"), ("deploy", "B", "--to", "models", "--verify", "X"),
    ("compile", "X", "--target", "l4"), ("openai", "X"), ("export", "R", "--weights", "X", "--out", "out"),
    ("merge", "X", "B", "--out", "out"), ("merge", "B", "X", "--out", "out"), ("push", "X", "127.0.0.1:9/a:b",
    "--plain-http"),
    ("embed", "B", "--images", "X", "--out", "out"), ("fit", "X", "--images", "I"), ("compile", "B", "--verify", "X"),
    ("merge", "B", "B", "--sign", "X", "--out", "out"), ("check", URL, "X"), ("export", "--weights", "X", "--out",
    "out"),
    ("build", "R", "--weights", "synthetic:0", "--sign", "X", "--out", "out"), ("bench", "B", "--weights", "X"),
    ("export", "R", "--weights", "synthetic:0", "--head", "depth", "--head-weights", "X", "--out", "out"),
)  # fmt: skip


def strange_file(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A path that leads to no regular file, or to one that is not what it should be."""
    kind, words = rng.choice(list(STRANGE)), rng.choice(PLACES)
    before = Path.cwd()
    os.chdir(here)
    try:
        suffix = ".toml" if words[:2] == ("export", "X") else rng.choice(("", ".onnx", ".pth", ".safetensors", ".gguf"))
        strange = STRANGE[kind](here / ("thing" if kind == "a link to itself" else f"thing{suffix}"))
    finally:
        os.chdir(before)
    return Attempt(kind="files that are none", arguments=_filled(words, kit, strange), refused=True)


def _filled(words: tuple[str, ...], kit: Kit, strange: Path) -> tuple[str, ...]:
    known = {"X": strange, "B": kit.bundle, "R": kit.recipe, "I": kit.images}
    return tuple(str(known.get(word, word)) for word in words)


# ---- outputs over what is somebody's ----

# What an option that names an output is called; a verb that has one must be listed here (tests/attack/attacks.py).
OUTPUT_OPTIONS = ("--out", "--page", "--to")
OUTPUTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("validate", "--page"): ("validate", "B", "--images", "I", "--page", "X"),
    ("build", "--out"): ("build", "R", "--weights", "synthetic:0", "--out", "X", "--force"),
    ("export", "--out"): ("export", "R", "--weights", "synthetic:0", "--out", "X"),
    ("fit", "--out"): ("fit", "B", "--images", "I", "--out", "X"),
    ("compile", "--out"): ("compile", "B", "--target", "l4", "--runtime", "tensorrt_rtx", "--out", "X"),
    ("merge", "--out"): ("merge", "B", "B", "--out", "X"),
    ("embed", "--out"): ("embed", "B", "--images", "I", "--out", "X"),
    ("pull", "--out"): ("pull", "127.0.0.1:9/a:b", "--plain-http", "--out", "X"),
    ("deploy", "--to"): ("deploy", "B", "--to", "X"),
}  # fmt: skip
THESIS = "five years"


def somebodys_output(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """An output where somebody's file, folder, pipe or device is."""
    kind = rng.choice(
        ("file", "folder", "pipe", "device", "link", "link to nothing", "work", "work link", "below a file")
    )
    return output_over(rng.choice(list(OUTPUTS)), kind, kit, here, rng)


def output_over(place: tuple[str, str], kind: str, kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """The verb with its output over a thing of that kind."""
    words, refused = OUTPUTS[place], True
    victim, out = here / "thesis", here / "out"
    victim.mkdir()
    (victim / "chapter").write_text(THESIS)
    if kind == "file":
        out.write_text(THESIS)
    elif kind == "folder":
        shutil.copytree(victim, out)
        refused = place[1] != "--to"  # a model repository holds other people's models, too
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind == "device":
        out = Path(rng.choice(("/dev/full", "/dev/null", "/dev/zero")))
    elif kind == "link":
        out.symlink_to(victim if rng.random() < 0.5 and place[1] != "--to" else victim / "chapter")
    elif kind == "link to nothing":
        out.symlink_to(here / "nowhere" / "at all")
    elif kind == "work":
        shutil.copytree(victim, here / ".out.work")
        refused = place[0] != "embed"  # it has no work folder
    elif kind == "work link":
        (here / ".out.work").symlink_to(victim)
        refused = place[0] != "embed"
    else:
        out = victim / "chapter" / "out"
    if place == ("validate", "--page") and kind.startswith("work"):
        out = victim  # a page has no work folder
    return Attempt(
        kind="outputs over what is somebody's", arguments=_filled(words, kit, out), refused=refused,
        victim=victim / "chapter",
    )  # fmt: skip


# ---- bundles ----

READERS: tuple[tuple[str, ...], ...] = (
    ("validate", "X"), ("deploy", "X", "--to", "models"), ("bench", "X"), ("diff", "B", "X"), ("diff", "X", "B"),
    ("fit", "X", "--images", "I"), ("compile", "X", "--target", "l4"),
)  # fmt: skip


def changed_bundle(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A bundle with one file changed, cut, grown, exchanged for another or gone."""
    copy = here / "bundle"
    shutil.copytree(kit.bundle, copy)
    path = rng.choice(sorted(copy.iterdir()))
    content = bytearray(path.read_bytes())
    how = rng.choice(("byte", "cut", "grow", "gone", "link", "pipe", "exchange"))
    path.unlink()
    if how == "byte":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        content = content[: rng.randrange(len(content))]
    elif how == "grow":
        content += bytes(rng.randrange(1, 100))
    if how in ("byte", "cut", "grow"):
        path.write_bytes(content)
    elif how == "link":
        path.symlink_to(kit.bundle / path.name)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "exchange":
        shutil.copy(rng.choice([other for other in sorted(kit.bundle.iterdir()) if other.name != path.name]), path)
    return Attempt(kind="bundles with a changed file", arguments=_filled(rng.choice(READERS), kit, copy), refused=True)


def relisted(folder: Path, name: str, content: bytes) -> None:
    """Puts `content` in the place of a file, and its hash into the manifest: damage that no hash shows."""
    (folder / name).write_bytes(content)
    manifest = bundle.read_manifest(folder)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    files = tuple(file.changed(**entry) if file.name == name else file for file in manifest.files)
    (folder / bundle.MANIFEST).write_bytes(manifest.changed(files=files).to_bytes())


def forged_file(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A bundle whose hashes are right and whose file is not."""
    copy = here / "bundle"
    shutil.copytree(kit.bundle, copy)
    name = rng.choice([bundle.REFERENCE, "model.onnx", "model.onnx"])
    content = bytearray((copy / name).read_bytes())
    for _ in range(rng.choice((1, 4, 40))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.2:
        content = content[: rng.randrange(len(content))]
    relisted(copy, name, bytes(content))
    arguments = _filled(rng.choice(READERS[:5]), kit, copy)
    return Attempt(kind="bundles with right hashes", arguments=arguments, refused=False)


def forged_graph(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A graph that is a program: loops, files elsewhere, constants and joins that fill memory."""
    import onnx

    copy = here / "bundle"
    shutil.copytree(kit.bundle, copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    SPOILT[rng.choice(list(SPOILT))](model, rng)
    relisted(copy, "model.onnx", model.SerializeToString())
    return Attempt(kind="graphs that are programs", arguments=_filled(rng.choice(READERS[:4]), kit, copy), refused=True)


def _join(model: Any, rng: random.Random) -> None:
    from onnx import helper

    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{last}_0" if name == last else name for name in node.output]
    count, kind = rng.randrange(30, 60), rng.choice(("Concat", "Add and Concat"))
    for i in range(count):
        value = f"{last}_{i}"
        other = value
        if kind != "Concat":
            other = f"{value}_again"
            model.graph.node.append(helper.make_node("Add", [value, value], [other]))
        ends = last if i == count - 1 else f"{last}_{i + 1}"
        model.graph.node.append(helper.make_node("Concat", [value, other], [ends], axis=0))


def _elsewhere(model: Any, rng: random.Random) -> None:
    entry = rng.choice([t for t in model.graph.initializer if t.external_data]).external_data
    place = rng.choice(("/etc/passwd", "../bundle/reference.npz", "reference.npz", "model.onnx", "/dev/zero", ""))
    next(e for e in entry if e.key == "location").value = place


def _beyond(model: Any, rng: random.Random) -> None:
    entry = rng.choice([t for t in model.graph.initializer if t.external_data]).external_data
    key = rng.choice(("offset", "length"))
    next(e for e in entry if e.key == key).value = rng.choice(("-1", "99999999999999", "9" * 50, "x", "1e3"))


def _operator(model: Any, rng: random.Random) -> None:
    from onnx import helper

    kind = rng.choice(("Loop", "If", "Scan", "RandomNormal", "ReverseSequence", "Foo", "StringConcat"))
    model.graph.node.append(helper.make_node(kind, [], ["extra"], domain=rng.choice(("", "evil"))))


def _huge(model: Any, rng: random.Random) -> None:
    from onnx import helper, numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20, 1 << 14], np.int64), "huge"))
    node = helper.make_node("ConstantOfShape", ["huge"], ["filled"])
    if rng.random() < 0.5:
        node = helper.make_node("Expand", [model.graph.initializer[0].name, "huge"], ["filled"])
    model.graph.node.append(node)


def _shape(model: Any, rng: random.Random) -> None:
    tensor = rng.choice([t for t in model.graph.initializer if t.external_data])
    tensor.dims[0] = rng.choice((-1, 1 << 40, tensor.dims[0] + 1))


SPOILT: dict[str, Callable[[Any, random.Random], None]] = {
    "joins": _join, "elsewhere": _elsewhere, "beyond": _beyond, "operator": _operator, "huge": _huge, "shape": _shape,
}  # fmt: skip


def forged_manifest(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A manifest with any value exchanged for any other, and the right hash of itself."""
    copy = here / "bundle"
    shutil.copytree(kit.bundle, copy)
    content = json.loads((copy / bundle.MANIFEST).read_bytes())
    content.pop("manifest_sha256")
    for _ in range(rng.choice((1, 1, 3))):
        _spoil(content, rng)
    raw = _sealed(content)
    (copy / bundle.MANIFEST).write_bytes(raw)
    words = rng.choice((*READERS[:5], ("inspect", "X"), ("report", "X"), ("inspect", "X", "--json")))
    return Attempt(kind="manifests with other values", arguments=_filled(words, kit, copy), refused=False)


def _sealed(content: dict[str, Any]) -> bytes:
    def canonical(value: Any) -> bytes:
        return (json.dumps(value, indent=1) + "\n").encode()

    return canonical({**content, "manifest_sha256": hashlib.sha256(canonical(content)).hexdigest()})


def _spoil(content: Any, rng: random.Random) -> None:
    """Exchanges one value somewhere inside."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and rng.random() < 0.8:
            content = content[key]
            continue
        content[key] = rng.choice((*VALUES, *TEXTS))
        return


# ---- recipes, weights, images, repositories, words ----


def recipe(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A recipe with other values, which names no weights: it is read, and then there is nothing to build."""
    import tomllib

    from dinoexport.config.recipe import _toml

    content = tomllib.loads(kit.recipe.read_text())
    for _ in range(rng.choice((1, 1, 2))):
        _spoil(content, rng)
    lines = [f"{key} = {_toml(value)}" for key, value in content.items() if value is not None]
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        raw = raw[: rng.randrange(len(raw))] + rng.randbytes(9)
    if rng.random() < 0.05:
        raw += b"\n" + b"".join(b"[t%d]\n" % i for i in range(20_000))
    (here / "recipe.toml").write_bytes(raw)
    return Attempt(kind="recipes", arguments=("export", str(here / "recipe.toml"), "--out", "out"), refused=True)


def weights(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A file of weights changed where a format keeps its structure."""
    source = rng.choice(kit.weights)
    content = bytearray(source.read_bytes())
    for _ in range(rng.choice((1, 2, 20))):
        edge = min(rng.randrange(rng.choice((64, 4000))), len(content) - 1)
        content[rng.choice((edge, -1 - edge))] = rng.choice((0, 0xFF, rng.randrange(256)))
    if rng.random() < 0.1:
        content = content[: rng.randrange(len(content))]
    path = here / source.name
    path.write_bytes(content)
    words = ("validate", "B", "--images", "I", "--weights", "X")
    # A bit of a number may have changed alone: then they are other weights than the bundle's, which is refused too.
    return Attempt(kind="weights", arguments=_filled(words, kit, path), refused=bytes(content) != source.read_bytes())


def images(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """Image files changed anywhere, among them none that is right."""
    folder = here / "images"
    folder.mkdir()
    sources = sorted(path for path in kit.images.rglob("*") if path.is_file())
    for i in range(8):
        content = bytearray(rng.choice(sources).read_bytes())
        for _ in range(rng.choice((1, 9, 200))):
            content[rng.randrange(min(len(content), rng.choice((64, 1 << 20))))] = rng.randrange(256)
        name = rng.choice(
            (f"{i}.png", f"{i}.jpg", f"{i}.jfif", f"caf\udce9{i}.png", f"\x1b[2J{i}.tif", f"{i}.bmp", f"{i}.webp")
        )
        (folder / name).write_bytes(content)
    words = ("deploy", "B", "--to", "models", "--samples", "X")
    return Attempt(kind="images", arguments=_filled(words, kit, folder), refused=False)


def repository(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A model repository that somebody else could write to."""
    models, secret = here / "models", here / "secret"
    secret.write_text("# dinoexport deployed this as tiny\nthe secret\n")
    (models / "tiny" / "1").mkdir(parents=True)
    texts = (
        "# dinoexport deployed this as tiny\n", "version_policy {\n" * 40_000, "\x1b[2J", "",
        '{"name": "tiny", "served": [7]}',
        '# dinoexport deployed this as tiny\nversion_policy: { specific: {\n    versions: [1]\n', "[" * 100_000,
    )  # fmt: skip
    for name in ("tiny/config.pbtxt", "tiny/1/config.pbtxt", "tiny.releases.json", "tiny_images", "tiny/warmup"):
        place, how = models / name, rng.choice(("absent", "text", "text", "text", "pipe", "link", "device", "folder"))
        if how == "text":
            place.write_text(rng.choice(texts))
        elif how == "pipe":
            os.mkfifo(place)
        elif how in ("link", "device"):
            place.symlink_to(secret if how == "link" else "/dev/zero")
        elif how == "folder":
            place.mkdir()
    words = rng.choice((("rollback", "X", "tiny"), ("deploy", "B", "--to", "X", "--name", "tiny")))
    return Attempt(kind="repositories", arguments=_filled(words, kit, models), refused=False, victim=secret)


def words(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """Any verb with any options, and any words as their values."""
    from typer.main import get_command

    from dinoexport.cli.app import app

    del kit, here
    command: Any = get_command(app)
    verb = rng.choice(sorted(command.commands))
    arguments = [verb]
    for parameter in command.commands[verb].params:
        wanted = parameter.param_type_name == "argument" or rng.random() < 0.3
        if not wanted or parameter.name in ("help", "show"):
            continue
        if parameter.param_type_name == "option":
            arguments.append(parameter.opts[-1])
        if not getattr(parameter, "is_flag", False):
            arguments += [rng.choice(TEXTS) for _ in range(max(1, parameter.nargs))]
    verbs_without = verb in ("list", "doctor", "schema")
    return Attempt(kind="words", arguments=tuple(a for a in arguments if "\0" not in a), refused=not verbs_without)


def server(kit: Kit, here: Path, rng: random.Random) -> Attempt:
    """A server that answers anything at all."""
    from tests.serving.endpoints import drip, response
    from tests.serving.test_hostile_endpoints import WRONG

    del here
    endpoint = _endpoint()
    endpoint.reset()
    path = rng.choice(list(endpoint.answers))
    how = rng.choice(("listed", "listed", "drips", "bytes", "JSON"))
    if how == "listed":
        endpoint.answers[path] = WRONG[rng.choice([kind for kind in WRONG if kind != "nothing"])]
    elif how == "drips":
        endpoint.answers[path] = drip(rng.choice((b"", b"HTTP/1.1 200 OK\r\n\r\n")), rng.choice((b"x", b"[", b"\n")))
    elif how == "bytes":
        endpoint.answers[path] = rng.randbytes(rng.randrange(200))
    else:
        content: Any = {
            "name": "tiny",
            "parameters": {"dinoexport": {"string_value": "{}"}},
            "outputs": [{"shape": [1]}],
        }
        for _ in range(3):
            _spoil(content, rng)
        raw = json.dumps(rng.choice((content, [content]))).encode("utf-8", "surrogatepass")
        endpoint.answers[path] = response(raw)
    url = f"http://127.0.0.1:{endpoint.port}"
    words = rng.choice((("check", url, "B", "--timeout-s", "1"), ("openai", url, "--timeout-s", "1")))
    return Attempt(kind="servers", arguments=_filled(words, kit, kit.bundle), refused=True)


@cache
def _endpoint() -> Any:
    from tests.serving.endpoints import Endpoint

    return Endpoint()


KINDS: dict[str, Maker] = {
    "files": strange_file, "outputs": somebodys_output, "changed": changed_bundle, "forged": forged_file,
    "graph": forged_graph, "manifest": forged_manifest, "recipe": recipe, "weights": weights, "images": images,
    "repository": repository, "server": server, "words": words, "more words": words,
}  # fmt: skip
