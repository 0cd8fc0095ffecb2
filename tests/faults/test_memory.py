"""Out of memory: in one cell, by a real limit of the process, and of a whole worker, time and again."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.observe.logs import read_lines
from pipeline.store.files import read_rows, write_rows
from pipeline.store.rows import FailedCell, PromptRow
from tests.faults.test_processes import SLOW
from tests.helpers.clock import patience
from tests.helpers.fault_toy import Tally, Toy, artifact, check_whole, log_of, tail

LONG, SPARE_MB = 24_000, 24


def measure(folder: Path, limited: bool) -> None:
    """Measure three prompts, of which the second needs more memory than there is where that is limited."""
    from pipeline.config.models import Pretrain, ScratchModel
    from pipeline.models.build import build_scratch
    from tests.helpers.models import FakeTokenizer, sharpen
    from tests.helpers.sweeps import SweepBench

    def model(layers: int, seed: int) -> object:
        spec = ScratchModel(
            kind="scratch", layers=layers, hidden=48, heads=4, kv_heads=2, intermediate=96,
            max_positions=2 * LONG, pretrain=Pretrain(steps=0),
        )  # fmt: skip
        return sharpen(build_scratch(spec, FakeTokenizer(), seed))  # type: ignore[arg-type]

    bench = SweepBench(folder / f"bench-{limited}", {"target": model(2, 1), "drafter": model(1, 2)})  # type: ignore[dict-item]
    first, second, third, _ = bench.prompts
    tokens = [3 + number % 90 for number in range(LONG)]
    write_rows(bench.file, [first, second.model_copy(update={"tokens": tokens}), third])
    evaluator = bench.evaluator()
    named = bench.measure_task(evaluator, folder)
    evaluator(replace(named, last=1, output=folder / "warm" / "rows" / "warm.jsonl"))
    if limited:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MB * 2**20, resource.RLIM_INFINITY))
    evaluator(replace(named, last=3, output=folder / "rows" / "measure.jsonl"))


def in_a_process(folder: Path, limited: bool) -> None:
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(folder, limited))
    process.start()
    process.join(patience(180))
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.fault("out of memory in one cell")
def test_the_other_cells_go_on(tally: Tally, tmp_path: Path) -> None:
    in_a_process(tmp_path, limited=True)
    rows = read_rows(tmp_path / "rows" / "measure.jsonl", PromptRow)
    failed = read_rows(tmp_path / "failed" / "measure.jsonl", FailedCell)
    assert {row.prompt_id for row in rows} == {"test-0", "test-2"}
    assert {cell.prompt_id for cell in failed} == {"test-1"}
    assert all("memory" in cell.error for cell in failed)
    # With enough of it the same call measures what is missing.
    in_a_process(tmp_path, limited=False)
    again = read_rows(tmp_path / "rows" / "measure.jsonl", PromptRow)
    kinds = {(row.cell.policy, row.cell.budget, row.cell.gamma) for row in again}
    tally.lost += 3 * len(kinds) - len(
        {(row.prompt_id, row.cell.policy, row.cell.budget, row.cell.gamma) for row in again}
    )
    assert tally.lost == 0 and len(again) == 3 * len(kinds)
    assert not (tmp_path / "failed" / "measure.jsonl").exists()


def working_on(storage: Path, cell: str) -> set[int]:
    """Processes of the newest run whose logs say that they have begun this item, and not that it is done."""
    last: dict[int, tuple[str, str]] = {}
    newest = max(storage.glob("run-records/*"), default=None)
    for file in newest.glob("worker-*.jsonl") if newest else ():
        for line in read_lines(file):
            if line["message"] in ("begun", "done", "failed"):
                last[line["pid"]] = (line["message"], line["item"])
    return {pid for pid, doing in last.items() if doing == ("begun", cell)}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.fault("an evaluator killed each time it tries one slice")
def test_what_kills_its_worker_is_recorded_and_the_rest_is_done(
    toy: Toy, tally: Tally, tmp_path: Path
) -> None:
    """As the kernel does where memory runs out: three times, then the run goes on without it."""
    expected, storage = toy.clean(SLOW), tmp_path / "runs"
    assert toy.run(storage, SLOW, stage="train") == 0, tail(storage)
    driver = toy.start(storage, SLOW, executor="ray")
    killed: set[int] = set()
    while driver.poll() is None and len(killed) < 3:
        for pid in working_on(storage, "replay-tales-64-00008.jsonl") - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.02)
    assert driver.wait(patience(300)) == 4, tail(storage)
    log = log_of(storage).read_text()
    assert "given up after 3 attempts" in log and "the same command tries them again" in log
    sweep = artifact(storage, "sweep")
    assert sweep is not None and len(list(sweep.glob("rows/*.jsonl"))) == 1
    failed = [cell for file in sweep.glob("failed/*.jsonl") for cell in read_rows(file, FailedCell)]
    assert {cell.cell.drafter for cell in failed} == {"full_only", "multi_view"}
    assert len({cell.prompt_id for cell in failed}) == 8
    assert toy.run(storage, SLOW) == 0, tail(storage)
    check_whole(tally, storage, expected)
