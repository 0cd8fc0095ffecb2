"""JSON that Python cannot read for its depth or its digits is answered as other bad JSON is."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.commands.doctor import _deepspeed
from jobs.executors.ray_train import read_settings
from jobs.records.status import read
from jobs.registry.champion import promote
from jobs.registry.versions import Version
from pipeline.data.reading import BadRow, json_lines
from pipeline.data.sources.longbench import published
from pipeline.errors import BadData
from pipeline.gate.evidence import EVIDENCE, EVIDENCE_ROWS, load_evidence
from pipeline.models.convert import PICKLED, pickled_files
from pipeline.observe.logs import read_lines
from pipeline.observe.training import read_metrics
from pipeline.results.summary import read_summary
from pipeline.store.artifacts import MANIFEST, Artifact
from pipeline.store.files import read_rows
from pipeline.store.rows import Prompt
from pipeline.train.checkpoints import COMPLETE, damage
from tests.helpers.tiny import tiny_config

TEXTS = {
    "torn": '{"a": [1',
    "lists": "[" * 100_000,
    "whole lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 100_000,
    "digits": "1" * 5000,
}


def evidence(folder: Path) -> None:
    with gzip.open(folder / EVIDENCE_ROWS, "wt"):
        pass
    load_evidence(folder)


def promotion(gate: Path) -> None:
    promote(Version("nowhere", "model", 1, "run", {}), gate)


# What reads a file that comes from outside, the file's name, and what is raised.
READERS: dict[str, tuple[str, Callable[[Path], object], type[ValueError]]] = {
    "DeepSpeed": ("zero.json", lambda file: read_settings(str(file)), BadData),
    "LongBench": ("prompts.json", lambda file: published(str(file), "qasper", str, file.parent), BadData),
    "checkpoint index": (PICKLED[1], lambda file: pickled_files(file.parent), BadData),
    "evidence": (EVIDENCE, lambda file: evidence(file.parent), BadData),
    "gate": ("gate.json", promotion, BadData),
    "manifest": (MANIFEST, lambda file: Artifact(file.parent, "prepare", "1").manifest, ValueError),
    "metrics": ("metrics.jsonl", read_metrics, BadData),
    "rows": ("rows.jsonl", lambda file: read_rows(file, Prompt), BadData),
    "status": ("status.json", read, BadData),
    "summary": ("summary.json", read_summary, BadData),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("reader", READERS)
def test_readers_name_the_file(tmp_path: Path, reader: str, text: str) -> None:
    name, call, error = READERS[reader]
    file = tmp_path / name
    file.write_text(text + "\n")
    with pytest.raises(error) as caught:
        call(file)
    assert type(caught.value) is error
    assert str(file if reader != "evidence" else tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_does_not_raise_tells_the_damage(tmp_path: Path, text: str) -> None:
    for name in (MANIFEST, COMPLETE):
        (tmp_path / name).write_text(text)
    (tmp_path / "log.jsonl").write_text(f'{text}\n{{"good": 1}}\n')
    good, bad = b'{"good": 1}', text.encode()

    assert Artifact(tmp_path, "prepare", "1").damaged() == [MANIFEST]
    assert f"{COMPLETE} is damaged" in (damage(tmp_path) or "")
    assert list(read_lines(tmp_path / "log.jsonl")) == [{"good": 1}]
    first, second = json_lines(io.BytesIO(bad + b"\n" + good), "a.jsonl")
    assert isinstance(first, BadRow) and (first.where, first.reason) == ("a.jsonl:1", "not JSON")
    assert not isinstance(second, BadRow)

    config = tiny_config({"run.executor": "ray", "train.deepspeed": str(tmp_path / COMPLETE)})
    assert _deepspeed(config).status == "fail"


@pytest.mark.parametrize(
    "reader", ["DeepSpeed", "LongBench", "checkpoint index", "evidence", "gate", "manifest"]
)
def test_no_object_is_as_bad(tmp_path: Path, reader: str) -> None:
    name, call, error = READERS[reader]
    (tmp_path / name).write_text("[1]")
    with pytest.raises(error) as caught:
        call(tmp_path / name)
    assert type(caught.value) is error
