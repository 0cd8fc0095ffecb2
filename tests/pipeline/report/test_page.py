"""The page is whole and escapes its text."""

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jobs.stages.report import ReportInputs, report
from pipeline.results.summary import Stage
from pipeline.store.artifacts import open_artifact
from pipeline.store.files import read_rows
from pipeline.store.rows import CellRow, FailedCell
from pipeline.units import binary_size
from tests.helpers.configs import MINIMAL
from tests.helpers.report import artifacts, config, local_source, row, sweep_rows
from tests.helpers.rows import make

PREPARE = Stage(name="prepare", seconds=12.0, cached=False)
SCRIPT = "<script>alert(1)</script>"
FAILED = make(
    FailedCell, drafter="multi_view", dataset="code", context="64", policy="all", budget="full", gamma=0,
    mode="replay", prompt_id="p9", error=f"RuntimeError: {SCRIPT} not finite",
)  # fmt: skip


class Resources(HTMLParser):
    """Tags, and every address that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The report of a sweep with a failure, whose texts hold markup."""
    storage = tmp_path_factory.mktemp("report")
    inputs = artifacts(storage, sweep_rows(), [FAILED], text=SCRIPT)
    return report(config(storage), ReportInputs(*inputs, stages=[PREPARE])).path


def test_report_folder_is_complete(made):
    assert {file.name for file in made.iterdir()} == {
        "report.html", "summary.json", "cells.jsonl", "predicted.jsonl", "run_off.jsonl", "again.jsonl",
        "analysis.json", "figures", "manifest.json",
    }  # fmt: skip
    assert len(read_rows(made / "cells.jsonl", CellRow)) == 20


def test_figures_are_real_pngs_of_a_readable_size(made):
    figures = sorted((made / "figures").iterdir())
    assert [file.stem for file in figures] == [
        "acceptance_by_budget_chunk_topk",
        "speedup_by_context",
        "speedup_by_memory",
    ]
    for file in figures:
        content = file.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert 800 <= width <= 1600 and 400 <= height <= 1200


def test_page_needs_nothing_but_itself(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    page = Resources(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.addresses) == 3
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import", text)


def test_markup_in_texts_and_errors_is_shown_not_run(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    assert SCRIPT not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # three samples and an error


def test_page_tells_what_is_missing_and_why(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    assert "Not drawn: Wall clock was measured at one γ only (4)." in text
    assert "incomplete: the rows so far are shown" in text
    assert "1 failed" in text


def test_page_leads_with_the_families_of_training_seeds(tmp_path):
    """Two variants of two seeds: +20 and +10 points at each γ."""
    rows = [
        row(drafter, prompt, kept, 100, gamma=gamma)
        for drafter, kept in {"a~1": 40, "a~2": 45, "b~1": 60, "b~2": 55}.items()
        for gamma in (2, 4)
        for prompt in range(12)
    ]
    variants = [{"name": name, "sparse_weight": 0, "seeds": [1, 2]} for name in "ab"]
    seeded = config(tmp_path, train={**MINIMAL["train"], "variants": variants})
    made = report(seeded, ReportInputs(*artifacts(tmp_path, rows, []), stages=[])).path
    text = (made / "report.html").read_text(encoding="utf-8")
    over, single = text.index("<h3>Over training seeds</h3>"), text.index("<h3>Single drafters</h3>")
    assert text.index("<h2>Drafter against drafter</h2>") < over < single < text.index("<h2>Controls</h2>")
    table = re.sub(r"<[^>]+>", " ", text[over:single])
    line = "b a code 64 chunk_topk 4 16 all prompts +15.0 [+10.0, +20.0] 2 +20.0, +10.0 12 6"
    assert line in " ".join(table.split())
    assert "The same at other γ (2 rows)" in table


def test_page_without_training_seeds_does_not_speak_of_them(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    assert "<h3>Over training seeds</h3>" not in text and "Single drafters" not in text


def test_controls_of_too_few_documents_are_not_judged(tmp_path):
    rows = [r for r in sweep_rows() if r.document_id in ("d0", "d1")]
    made = report(config(tmp_path), ReportInputs(*artifacts(tmp_path, rows, []), stages=[])).path
    text = (made / "report.html").read_text(encoding="utf-8")
    assert "too few documents to rank (2 of at least 5)" in text
    assert "context used" not in text and "context not used" not in text


def test_samples_go_from_the_least_to_the_most_repetitive(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"repetition rate (\d\.\d\d)", text) == ["0.00", "0.40", "0.80"]
    assert text.count(">looping</span>") == 1


def test_second_run_reuses_the_figures_and_tells_its_own_stages(tmp_path):
    inputs = artifacts(tmp_path, sweep_rows(), [])
    first = report(config(tmp_path), ReportInputs(*inputs, stages=[PREPARE]))
    drawn = {file: file.stat().st_mtime_ns for file in (first.path / "figures").iterdir()}
    again = [PREPARE.model_copy(update={"seconds": 0.1, "cached": True})]
    second = report(config(tmp_path), ReportInputs(*inputs, stages=again))
    assert second == first
    assert {file: file.stat().st_mtime_ns for file in (first.path / "figures").iterdir()} == drawn
    stages = json.loads((second.path / "summary.json").read_text())["stages"]
    assert [(s["name"], s["cached"]) for s in stages] == [("prepare", True), ("report", True)]
    assert not set(second.manifest["files"]) & {"summary.json", "report.html"}


def test_memory_of_training_is_shown_by_rank(tmp_path):
    inputs = artifacts(tmp_path, sweep_rows(), [])
    trained = open_artifact(tmp_path, "drafter-multi_view", {})
    trained.finish({}, {"peak_memory_bytes_by_rank": [1_500_000_000, 1_250_000_000]}, 1.0)
    untrained = open_artifact(tmp_path, "drafter-untrained", {})
    untrained.finish({}, {}, 1.0)
    made = report(config(tmp_path), ReportInputs(*inputs, stages=[], trained=[trained, untrained])).path
    summary = json.loads((made / "summary.json").read_text())
    ranks = [1_500_000_000, 1_250_000_000]
    assert summary["training_memory"] == [{"model": "drafter-multi_view", "ranks": ranks}]
    page = (made / "report.html").read_text()
    rows = page[page.index("Memory of training") :]
    assert "drafter-multi_view" in rows and "untrained" not in rows
    assert all(page_size in rows for page_size in map(binary_size, ranks))


def test_rows_added_by_another_try_make_another_report(tmp_path):
    rows = sweep_rows()
    inputs = artifacts(tmp_path, rows, [FAILED])
    first = report(config(tmp_path), ReportInputs(*inputs, stages=[]))
    artifacts(tmp_path, [*rows, row("multi_view", 12, budget=16)], [FAILED])
    second = report(config(tmp_path), ReportInputs(*inputs, stages=[]))
    assert second.path != first.path


def test_replay_alone_has_no_speed_figures(tmp_path):
    rows = [r for r in sweep_rows() if r.mode == "replay"]
    made = report(config(tmp_path), ReportInputs(*artifacts(tmp_path, rows, []), stages=[])).path
    assert [file.stem for file in (made / "figures").iterdir()] == ["acceptance_by_budget_chunk_topk"]
    text = (made / "report.html").read_text(encoding="utf-8")
    assert text.count("Not drawn: No cell&#39;s wall clock was measured.") == 3


def test_local_files_are_not_passed_off_as_the_published_data(tmp_path):
    prepare, teach, sweep = artifacts(tmp_path, sweep_rows(), [])
    prepare.finish({}, {"sources": {"code": local_source("pg19", "x.gz")}}, 1.0)
    made = report(config(tmp_path), ReportInputs(prepare, teach, sweep, stages=[])).path
    assert "are not PG-19 figures" in (made / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("bytes_", "text"), [(None, ""), (12, "12 B"), (2048, "2.0 KiB"), (3 * 2**29, "1.5 GiB")]
)
def test_sizes_in_words(bytes_, text):
    assert binary_size(bytes_) == text
