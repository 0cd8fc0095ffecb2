"""What comes from outside, nearly right: success, or an error that says what is wrong; never a traceback.

`BUDGETDRAFT_FUZZ=20000 python -m pytest tests/fuzz` tries so many of each, and others each time.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from typer.testing import CliRunner

from jobs.cli.main import app
from pipeline.config.schema import Config
from pipeline.data.documents import Document
from pipeline.data.reading import BadRow
from pipeline.data.sources.registry import make_readers
from pipeline.errors import BadData
from pipeline.gate.evidence import load_evidence
from pipeline.observe.training import read_metrics
from pipeline.store.artifacts import Artifact
from pipeline.store.layout import MANIFEST, METRICS, SUMMARY
from pipeline.train.checkpoints import COMPLETE, newest_whole
from tests.fuzz.mangle import JSON, broken, nearly, torn
from tests.helpers.configs import MINIMAL
from tests.helpers.documents import bench, book, narrative, story
from tests.helpers.toys import artifact

EXAMPLES = int(os.environ.get("BUDGETDRAFT_FUZZ", 0))
fuzzed = settings(
    max_examples=EXAMPLES or 25,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
CODES = {0, 2, 3, 4}


def run(*arguments: str) -> int:
    """The exit code of a command; an error that it does not turn into one is raised here."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in CODES and "Traceback" not in result.output, result.output[-2000:]
    return int(result.exit_code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where each test writes its input; nothing else may appear in it or beside it."""
    outer = tmp_path_factory.mktemp("fuzz")
    (outer / "in").mkdir()
    yield outer / "in"
    assert os.listdir(outer) == ["in"]


# ── configs ───────────────────────────────────────────────────────────────────────────────────────

PLAIN_YAML = yaml.safe_dump(MINIMAL).encode()


@fuzzed
@given(content=nearly(MINIMAL).map(lambda v: yaml.safe_dump(v).encode()) | torn(PLAIN_YAML))
def test_configs(folder: Path, content: bytes) -> None:
    (folder / "a.yaml").write_bytes(content)
    assert run("config", str(folder / "a.yaml")) in (0, 2)


FIELDS = (
    "train.steps", "train.variants.0.budgets", "train.variants.multi_view.budgets.16", "data.contexts",
    "sweep.gammas", "target.rope_scaling", "run.resources", "sweep", "data.sources.0.files", "name", "",
)  # fmt: skip


@fuzzed
@given(
    field=st.sampled_from(FIELDS) | st.text(max_size=12),
    value=JSON.map(json.dumps) | st.text(max_size=20),
)
def test_overrides(folder: Path, field: str, value: str) -> None:
    (folder / "a.yaml").write_bytes(PLAIN_YAML)
    assert run("config", str(folder / "a.yaml"), "--", f"{field}={value}") in (0, 2)


# ── data ──────────────────────────────────────────────────────────────────────────────────────────

CHAT = {"messages": [{"role": "user", "content": story(5, 2)}], "tools": [{"type": "function"}]}
KINDS: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "prompts": ({"files": ["*.jsonl"], "chat_template": True}, "a.jsonl", [{"prompt": story(1)}, CHAT]),
    "text": (
        {"files": ["*.jsonl"], "test_fraction": 0.5},
        "a.jsonl",
        [{"text": story(k, 4)} for k in range(3)],
    ),
    "longbench": ({"task": "qmsum", "path": "."}, "qmsum.jsonl", [bench(1, "Why?"), bench(2, "Who?")]),
    "pg19": ({"path": "./", "use": ["test"]}, "test.jsonl", [book(1), book(2)]),
    "lwm": (
        {"task": "summary", "path": "./", "use": ["test"], "prompt_split": "test", "rows": []},
        "test.jsonl",
        [narrative(1, "a"), narrative(2, "b")],
    ),
}


def documents(folder: Path, kind: str, name: str, content: bytes) -> None:
    """Read a file as a source of this kind: each row is a document or a bad row, or the file is bad data."""
    for old in folder.iterdir():
        old.unlink()
    (folder / name).write_bytes(content)
    values = copy.deepcopy(MINIMAL)
    train = {"kind": "text", "name": "code", "files": ["stdlib"]}
    source = {"kind": kind, "name": "fuzzed", **KINDS[kind][0]}
    if kind == "text":
        source["files"] = [name]
    values["data"] |= {"root": str(folder), "sources": [train, source]}
    config = Config.model_validate(values)
    reader = make_readers(config.data, config.seed)["fuzzed"]
    try:
        rows = [row for shard in reader.shards() for row in reader.documents(shard)]
    except BadData:
        return
    assert all(isinstance(row, Document | BadRow) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_json_lines(folder: Path, kind: str) -> None:
    _, name, rows = KINDS[kind]

    @fuzzed
    @given(st.lists(st.one_of(*map(broken, rows)), min_size=1, max_size=3))
    def read(lines: list[bytes]) -> None:
        documents(folder, kind, name, b"\n".join(lines))

    read()


@fuzzed
@given(torn(gzip.compress(json.dumps(bench(1, "Why?")).encode())))
def test_gzip(folder: Path, content: bytes) -> None:
    documents(folder, "longbench", "qmsum.jsonl.gz", content)


@pytest.mark.parametrize("kind", ["pg19", "lwm", "text"])
def test_parquet(folder: Path, kind: str) -> None:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(KINDS[kind][2]), buffer)
    name = "a.parquet" if kind == "text" else "test.parquet"

    @settings(fuzzed, max_examples=max(5, EXAMPLES // 10))
    @given(torn(buffer.getvalue()))
    def read(content: bytes) -> None:
        documents(folder, kind, name, content)

    read()


@fuzzed
@given(broken([{"prompt": story(1)}, CHAT]))
def test_lists_of_prompts(folder: Path, content: bytes) -> None:
    values = {**KINDS["prompts"][0], "files": ["*.json"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "prompts", (values, "a.json", []))
        documents(folder, "prompts", "a.json", content)


# ── what a run has written ────────────────────────────────────────────────────────────────────────


def originals(finished: Path) -> dict[str, Any]:
    read = lambda stage, name: json.loads((artifact(finished, stage) / name).read_text())  # noqa: E731
    return {"manifest": read("teach", MANIFEST), "summary": read("report", SUMMARY)}


def test_manifests(finished: Path, folder: Path) -> None:
    @fuzzed
    @given(broken(originals(finished)["manifest"]))
    def read(content: bytes) -> None:
        (folder / MANIFEST).write_bytes(content)
        damaged = Artifact(folder, "teach", "0").damaged()
        assert damaged and all(isinstance(name, str) for name in damaged)

    read()


def test_summaries(finished: Path, folder: Path) -> None:
    """What is recommended of one that can be read is in words, too."""

    @fuzzed
    @given(broken(originals(finished)["summary"]))
    def read(content: bytes) -> None:
        (folder / SUMMARY).write_bytes(content)
        run("recommend", str(folder / SUMMARY), "--context", "64")

    read()


METRICS_ROW = {"step": 10, "loss/total": 1.5, "train/grad_norm": 0.5}


@fuzzed
@given(st.lists(broken(METRICS_ROW), max_size=3))
def test_metrics(folder: Path, lines: list[bytes]) -> None:
    (folder / METRICS).write_bytes(b"".join(line + b"\n" for line in lines))
    try:
        rows = read_metrics(folder / METRICS)
    except BadData:
        return
    assert all(isinstance(row, dict) and isinstance(row["step"], int) for row in rows)


MARKER = {
    "step": 4, "unlogged": [], "files": {"weights.safetensors": {"bytes": 4, "sha256": "0" * 64}},
}  # fmt: skip


@fuzzed
@given(broken(MARKER))
def test_checkpoints(folder: Path, content: bytes) -> None:
    """A marker that does not fit the files is no checkpoint; it is removed, and nothing else."""
    place = folder / "run" / "checkpoints" / "step-000004"
    place.mkdir(parents=True, exist_ok=True)
    (place / COMPLETE).write_bytes(content)
    assert newest_whole(folder / "run") == 0
    assert not place.exists() and (folder / "run").exists()


EVIDENCE = {"drafter": "multi_view", "target": {}, "rows": [], "facts": {}}


@fuzzed
@given(facts=broken(EVIDENCE), rows=st.binary(max_size=40) | st.just(gzip.compress(b"{}\n")))
def test_evidence(folder: Path, facts: bytes, rows: bytes) -> None:
    (folder / "evidence.json").write_bytes(facts)
    (folder / "rows.jsonl.gz").write_bytes(rows)
    with pytest.raises(BadData):
        load_evidence(folder)
