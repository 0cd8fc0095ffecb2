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
from pipeline.store.artifacts import MANIFEST
from tests.data.conftest import bench, book, narrative, story, write_lines

BOOKS = Path(__file__).resolve().parent.parent / "conf" / "books.yaml"
SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data"


def made_books(root: Path) -> None:
    """Files laid out as `conf/books.yaml` wants them, of made-up text."""
    for split, first, count in (("train", 0, 4), ("validation", 10, 2), ("test", 20, 2)):
        rows = [book(k, text=story(k, 400)) for k in range(first, first + count)]
        write_lines(root / "pg19" / f"{split}.jsonl.gz", rows)
    meetings = [bench(k, f"What of {k}?") | {"context": story(k, 400)} for k in (30, 31)]
    write_lines(root / "longbench" / "qmsum.jsonl.gz", meetings)
    for split, first in (("train", 40), ("validation", 50)):
        rows = [narrative(0, f"n{k}") for k in range(first, first + 2)]
        for k, row in enumerate(rows, first):
            row["document"]["text"] = story(k, 400)
        write_lines(root / "narrativeqa" / f"{split}.jsonl.gz", rows)


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
            marks=pytest.mark.skipif(not SAMPLES.exists(), reason=f"the sample data is not at {SAMPLES}"),
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
