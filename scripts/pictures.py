"""Draw the pictures of docs/images from a real build: `make pictures`. Needs a Chromium (apt-get install chromium)."""

from __future__ import annotations

import html
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BUILD = "dinoexport build vits14 --weights synthetic:0 --target a100 --runtime tensorrt_rtx"
_TERMINAL = """<body style="margin:0;background:#14181d"><pre style="margin:0;padding:16px 20px;color:#e6e9ed;
display:inline-block;font:13px/1.25 'DejaVu Sans Mono',monospace"><span style="color:#4cc26a">$</span> {command}
{shown}</pre></body>"""


@contextmanager
def browser() -> Iterator[Any]:
    """A page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        sys.exit("Pictures are drawn by a Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started.new_page(viewport={"width": 1000, "height": 800}, color_scheme="light")
        started.close()


def save(name: str, png: bytes) -> None:
    """The picture with a palette of 256 colours, which is a third of the bytes."""
    from PIL import Image

    image = Image.open(BytesIO(png)).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT)
    image.save(IMAGES / name, "PNG", optimize=True)


def of_report(page: Any, report: Path) -> None:
    """The head of the report, the photograph of many patches, and the error by block."""
    page.goto(report.as_uri())
    rows = page.locator(".pictures")
    second = rows.nth(1).bounding_box()
    head = {"x": 0, "y": 0, "width": 1000, "height": second["y"] + second["height"]}
    save("report.png", page.screenshot(clip=head, full_page=True))
    save("tokens.png", rows.last.screenshot())
    save("blocks.png", page.locator("h2:has-text('Error by block') ~ table").first.screenshot())


def of_terminal(page: Any, shown: str) -> None:
    """A still of the build's end."""
    lines = shown.splitlines()
    rows = [number for number, line in enumerate(lines) if line.startswith("│")]
    left_out = "".join(c if c == "│" else " " for c in lines[rows[0]]).replace("│  ", "│ …", 1)
    kept = [*lines[: rows[6]], left_out, *lines[rows[-6] :]]
    wrapped = [part for line in kept for part in textwrap.wrap(line, 130, subsequent_indent=" " * 8) or [""]]
    page.set_content(_TERMINAL.format(command=html.escape(BUILD), shown=html.escape("\n".join(wrapped))))
    save("build.png", page.locator("pre").screenshot())


def main() -> None:
    """Builds ViT-S with synthetic weights and draws it."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", *BUILD.split()]
        shown = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout
        with browser() as page:
            of_report(page, Path(folder) / "bundles" / "vits14-fp16-a100" / "report.html")
            of_terminal(page, shown)


if __name__ == "__main__":
    main()
