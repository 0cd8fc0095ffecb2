"""`conf/books.yaml` on made-up files and on the sample data."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from jobs.stages.pipeline import run_pipeline
from pipeline.config.files import load_config
from pipeline.store.layout import MANIFEST
from tests.helpers.documents import made_books
from tests.helpers.paths import ROOT, SHARED

BOOKS = ROOT / "conf" / "books.yaml"
SAMPLES = SHARED / "data"


def sample_books(root: Path) -> None:
    """The sample data, with three of its training books."""
    (root / "pg19").mkdir(parents=True)
    for name in ("longbench", "narrativeqa", "pg19/validation.jsonl.gz", "pg19/test.jsonl.gz"):
        (root / name).symlink_to(SAMPLES / name)
    with gzip.open(SAMPLES / "pg19" / "train.jsonl.gz") as file:
        (root / "pg19" / "train.jsonl.gz").write_bytes(gzip.compress(b"".join(islice(file, 3)), 1))


@pytest.mark.parametrize(
    ("lay_out", "documents"),
    [
        (made_books, {"pg19-sample": 2, "qmsum-sample": 2, "narrativeqa-sample": 2, "needle-sample": 2}),
        pytest.param(
            sample_books,
            {"pg19-sample": 8, "qmsum-sample": 40, "narrativeqa-sample": 15, "needle-sample": 3},
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not SAMPLES.exists(), reason=f"the sample data is not at {SAMPLES}"),
            ],
        ),
    ],
)
def test_books_are_named_for_what_they_are(
    tmp_path: Path, lay_out: Callable[[Path], None], documents: dict[str, int]
) -> None:
    """A sample is no official split: its names say so, in the manifest, the files and every prompt."""
    lay_out(tmp_path / "data")
    overrides = [f"data.root={tmp_path / 'data'}", f"storage={tmp_path / 'runs'}", "data.prompts=2"]
    overrides += ["data.validation_prompts=2", "data.max_sequences=4", "tracking.enabled=false"]
    folder = run_pipeline(load_config(BOOKS, [*overrides, "run.executor=inline"]), "prepare")
    counts = json.loads((folder / MANIFEST).read_text())["counts"]
    assert {name: count["test"] for name, count in counts["documents"].items()} == documents
    for source in counts["sources"].values():
        assert source["from"] == "local files"
        assert all(file["path"].startswith(str(tmp_path / "data")) for file in source["files"])
    assert counts["prompts"] == {"validation-pg19-sample-1K.jsonl": 2} | {
        f"test-{name}-{context}.jsonl": 2 for name in documents for context in ("1K", "2K")
    }
    for file in (folder / "prompts").glob("test-*.jsonl"):
        datasets = {json.loads(line)["dataset"] for line in file.read_text().splitlines()}
        assert datasets <= documents.keys() and len(datasets) == 1
