"""What mkdocs is told besides mkdocs.yml: links out of docs/ keep working, and a new page needs no entry in the menu.

A page links to a file of the repository as it does on any code host, `../validate/dinov2.toml`. The site gets a copy of
each such file under `repository/`, and Markdown among them becomes a page.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent
MORE = "More"
_OUTSIDE = re.compile(r"(\]\()\.\./([^)#\s]+)")
_LOCAL = re.compile(r"!?\[[^\]]*\]\((?!\w+:|#|/)([^)#\s]+)")


def on_config(config: Any) -> Any:
    """Adds the pages that the menu does not list."""
    docs = Path(config["docs_dir"])
    listed = set(re.findall(r"[\w-]+\.md", str(config["nav"])))
    if rest := [path.name for path in sorted(docs.glob("*.md")) if path.name not in listed]:
        config["nav"].append({MORE: rest})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the files outside docs/ that its pages link to, and what those link to in turn."""
    from mkdocs.structure.files import File, InclusionLevel

    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    wanted = {path for text in texts.values() for _, path in _OUTSIDE.findall(text)}
    for path in sorted(wanted):
        if path.endswith(".md"):
            beside = PurePosixPath(path).parent
            wanted |= {str(beside / link) for link in _LOCAL.findall((ROOT / path).read_text(encoding="utf-8"))}
    for path in sorted(wanted):
        where = {"abs_src_path": str(ROOT / path), "inclusion": InclusionLevel.NOT_IN_NAV}
        files.append(File.generated(config, f"repository/{path}", **where))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links out of docs/ to the copies."""
    return _OUTSIDE.sub(r"\1repository/\2", markdown)
