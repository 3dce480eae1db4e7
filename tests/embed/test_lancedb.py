"""LanceDB takes a part as it is: the column is a vector there, and the nearest row of a row is itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dinoexport.embed import run
from tests.conftest import DATA
from tests.embed.conftest import BROKEN, COUNT

LANCE = DATA.parents[1] / ".stores" / "lance"
CODE = """
import json, sys
sys.path.append(sys.argv[1])
import lancedb, pyarrow.parquet as pq
rows = pq.read_table(sys.argv[2]).select(["path", "class_token", "error"])
table = lancedb.connect(sys.argv[3]).create_table("images", data=rows.filter(rows["error"].is_null()))
found = {}
for row in table.to_arrow().to_pylist():
    nearest = table.search(row["class_token"], vector_column_name="class_token").limit(1).to_list()
    found[row["path"]] = nearest[0]["path"]
print(json.dumps(found))
"""


@pytest.mark.skipif(not (LANCE / "lancedb").is_dir(), reason="no LanceDB here: make stores installs it")
def test_lancedb_opens_it(tiny: Path, photos: Path, tmp_path: Path) -> None:
    run.embed(tiny, str(photos), str(tmp_path / "out"), workers=1, max_failed=1)
    words = [sys.executable, "-c", CODE, str(LANCE), str(tmp_path / "out"), str(tmp_path / "database")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert len(found) == COUNT - BROKEN and all(one == other for one, other in found.items())
