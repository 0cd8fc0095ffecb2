"""What a sweep of 10,000 cells costs beside its own work: memory, orchestration, resuming, tracking.

The sweep is real: `jobs.stages.sweep.sweep` over the artifacts of the earlier stages, on Ray, evaluators as
processes, recorded as the pipeline records it. Its models are tiny and random and its text is random words:
the rows say nothing of drafters. Every call has a process of its own, the driver. Only the throughput of
evaluators is simulated: nodes of one CPU each on this machine, and items that sleep.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import yaml

from benchmarks.rows import Row, row
from jobs.executors.choose import NoExecutor, make_executor
from jobs.executors.inline import InlineExecutor
from jobs.records.record import RunRecord
from jobs.stages.pipeline import run_pipeline, settled
from jobs.stages.prepare import prepare
from jobs.stages.sweep import sweep
from jobs.stages.teach import teach
from jobs.stages.train import pretrain, train
from jobs.tracking.tracker import Tracker
from pipeline.config.files import load_config
from pipeline.config.schema import Config
from pipeline.hardware import peak_bytes
from pipeline.observe import logs
from pipeline.observe.events import Began, Event, Items, listening
from pipeline.results.pool import Axes, cell_rows
from pipeline.store.files import read_all
from pipeline.store.layout import MANIFEST, ROWS
from pipeline.store.rows import CellRow, PromptRow

Result = TypeVar("Result")

MODEL: dict[str, Any] = {
    "kind": "scratch", "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 64,
    "max_positions": 512, "pretrain": {"steps": 0},
}  # fmt: skip
SOURCES = ("first", "second")
# 2 sources × 4 contexts × 2 drafters × 4 policies × 5 budgets × 16 γ × 2 thresholds = 10,240 cells.
CONFIG: dict[str, Any] = {
    "name": "scale",
    "data": {
        "sources": [
            {"kind": "text", "name": name, "files": [f"{name}-*.txt"], "test_fraction": 0.5}
            for name in SOURCES
        ],
        "tokenizer": {"kind": "bpe", "vocab_size": 512},
        "sequence_tokens": 256, "max_sequences": 8, "max_new_tokens": 32, "prompts": 8,
        "validation_prompts": 2,
        "contexts": [{"name": str(tokens), "tokens": tokens} for tokens in (96, 128, 160, 192)],
    },
    "target": {**MODEL, "layers": 2},
    "drafter": MODEL,
    "train": {
        "steps": 0, "window_tokens": 32,
        "variants": [{"name": name, "steps": 0} for name in ("one", "other")],
    },
    "decode": {"draft_length": "adaptive"},
    "sweep": {
        "mode": "replay", "policies": ["chunk_topk", "chunk_topk_paper", "streaming", "snapkv"],
        "budgets": [16, 24, 32, 48, "full"], "gammas": list(range(1, 17)), "thresholds": [0.0, 0.4],
        "controls": [], "num_evaluators": 2,
    },
    "report": {"bootstrap_samples": 100},
    "run": {"executor": "ray", "ray_address": "local", "device": "cpu"},
}  # fmt: skip
NODES, NAP_S, NAPS_PER_NODE = (1, 2, 4), 0.1, 150
STORE = 80 * 2**20  # bytes of a simulated node's object store


class Call(NamedTuple):
    """One call of the stage in a driver of its own.

    `stage_s` is the call, `ray_s` starting Ray before it, `driven_s` from asking for the first evaluator to
    the last result. `busy` is the seconds of each item by its name, as the workers' logs have them.
    """

    ray_s: float
    stage_s: float
    driven_s: float
    busy: dict[str, float]
    peak_bytes: int
    folder: Path
    fingerprint: str


class Tracked(NamedTuple):
    """The curves that MLflow took; seconds to open it, of the main thread's calls, until all are there."""

    curves: int
    opening_s: float
    calls_s: float
    all_s: float


def scale_rows(overrides: Sequence[str] = (), nodes: Sequence[int] = NODES) -> list[Row]:
    """All rows.

    Args:
        overrides: of the config above.
        nodes: simulated nodes whose throughputs are compared.
    """
    with TemporaryDirectory() as folder:
        config = prepared(Path(folder), overrides)
        first = apart(drive, config)
        again = apart(drive, config)
        lost = sorted((first.folder / ROWS).iterdir())[-1]
        lost.unlink()
        (first.folder / MANIFEST).unlink()
        resumed = apart(drive, config)
        cells = swept(config, first.folder)
        tracked = apart(track, config, first.folder, first.fingerprint)
        shutil.rmtree(first.folder)
        most = apart(whole_run, config)
    assert not again.busy, f"a complete sweep did {sorted(again.busy)} again"
    assert list(resumed.busy) == [lost.name], f"resuming did {sorted(resumed.busy)}, not {lost.name} alone"
    return [
        *sweep_rows(config, len(cells), first, most),
        *scan_rows(again, resumed),
        *tracking_rows(tracked),
        *(throughput_rows(apart(throughputs, nodes)) if nodes else []),
    ]


def sweep_rows(config: Config, cells: int, call: Call, most: int) -> list[Row]:
    """Memory and orchestration. `most` is the memory of a whole run's driver, in bytes."""
    prompts, evaluators = config.data.prompts, config.sweep.num_evaluators
    busy = sum(call.busy.values())
    orchestration_s = call.ray_s + call.stage_s - busy / evaluators
    size = f"{cells} cells × {prompts} prompts = {cells * prompts} rows"
    split = f"Ray starts in {call.ray_s:.1f} s, the stage takes {call.stage_s:.1f} s"
    work = f"{busy:.1f} s of {len(call.busy)} items by the workers' logs, loading models included"
    return [
        row(
            "driver memory: stage sweep", [call.peak_bytes / 1e9], 1, at_most=True, unit=" GB",
            note=f"most resident; real, {size}, {evaluators} evaluators, tiny random models, replay",
        ),
        row(
            "driver memory: all stages, report and tracking too", [most / 1e9], 1, at_most=True, unit=" GB",
            note=f"most resident; real, the same sweep; the report holds all {cells * prompts} rows",
        ),
        row(
            "orchestration per cell", [1000 * orchestration_s / cells], 10, at_most=True, unit=" ms",
            note=f"real, tracking off; {split}, less {work}, ÷ {evaluators} evaluators",
        ),
    ]  # fmt: skip


def scan_rows(again: Call, resumed: Call) -> list[Row]:
    """The cost of calling the stage again."""
    work = f"{resumed.driven_s:.1f} s of starting one evaluator and making the file"
    return [
        row(
            "scanning a complete sweep", [again.stage_s], 10, at_most=True, unit=" s",
            note="real; the same call again: manifest, and checksums of all files",
        ),
        row(
            "scanning a sweep without manifest and one file", [resumed.stage_s - resumed.driven_s], 10,
            at_most=True, unit=" s", note=f"real; reading what is there and a new manifest, without {work}",
        ),
    ]  # fmt: skip


def tracking_rows(tracked: Tracked) -> list[Row]:
    """MLflow beside the pipeline."""
    curve_ms = 1000 * tracked.all_s / tracked.curves
    return [
        row(
            "tracking: the main thread's time in its calls", [tracked.calls_s], 1, at_most=True, unit=" s",
            note=f"real; {tracked.curves} curves queued; opening a new store before takes "
            f"{tracked.opening_s:.1f} s, and leaving the run waits for what is left",
        ),
        row(
            "tracking: time per curve", [curve_ms], unit=" ms",
            note=f"real, sqlite; {tracked.curves} runs, one a curve over γ, read back; {tracked.all_s:.0f} s "
            "in its own thread",
        ),
    ]  # fmt: skip


def throughput_rows(rates: dict[int, float]) -> list[Row]:
    """How the throughput of evaluators grows with the number of nodes."""
    least = {2: 1.8, 4: 3.4}
    (fewest, base), *others = rates.items()
    basis = f"simulated: nodes of one CPU on this machine, items that sleep {NAP_S} s"
    first = row(
        f"items/s on {fewest} node", [base], unit="", note=f"{basis}; counted once every evaluator is up"
    )
    return [first] + [
        row(
            f"items/s on {nodes} nodes ÷ {fewest}", [rate / base], least.get(nodes),
            note=f"{basis}; {rate:.1f} items/s",
        )
        for nodes, rate in others
    ]  # fmt: skip


def prepared(folder: Path, overrides: Sequence[str]) -> Config:
    """A config whose stages before the sweep are done, in this process."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    for name in SOURCES:
        for number in range(24):
            (folder / f"{name}-{number:02d}.txt").write_text(" ".join(draw.choices(words, k=2000)))
    file = folder / "scale.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    config = settled(load_config(file, [f"data.root={folder}", f"storage={folder / 'runs'}", *overrides]))
    inputs(config, InlineExecutor(config))
    return config


def inputs(config: Config, executor: Any) -> tuple[Any, ...]:
    """What the sweep gets from the stages before it."""
    data = prepare(config, executor)
    scratch = pretrain(config, executor, data)
    labels = teach(config, executor, data, scratch)
    return data, labels, None, scratch, train(config, executor, data, labels, scratch)


def drive(config: Config) -> Call:
    """The stage sweep, as the pipeline calls it."""
    marks: list[float] = []

    def listen(stage: str, event: Event) -> None:
        if isinstance(event, Began | Items):
            marks.append(time.perf_counter())

    with RunRecord(config, "sweep") as record, closing(make_executor(config)) as executor:
        given = inputs(config, NoExecutor())
        began = time.perf_counter()
        list(executor.map(abs, [0], "ray"))
        ready = time.perf_counter()
        with record.stage("sweep"), listening(listen):
            artifact, failures = sweep(config, executor, *given)
        ended = time.perf_counter()
        assert artifact.complete and not failures
        busy = {
            line["item"]: line["seconds"]
            for file in record.folder.glob("*.jsonl")
            for line in logs.read_lines(file)
            if line["stage"] == "sweep" and line["message"] == "done"
        }
    driven = marks[-1] - marks[0] if marks else 0.0
    return Call(ready - began, ended - ready, driven, busy, peak_bytes(), artifact.path, artifact.fingerprint)


def whole_run(config: Config) -> int:
    """The peak memory of a driver that goes on to the report, with tracking."""
    run_pipeline(config)
    return peak_bytes()


def swept(config: Config, folder: Path) -> list[CellRow]:
    """The cells as the report makes them."""
    rows = read_all(folder / ROWS, PromptRow)
    return cell_rows(rows, Axes.of(config), config.report.bootstrap_samples, config.seed)


def track(config: Config, folder: Path, fingerprint: str) -> Tracked:
    """Mirror the sweep as the pipeline does at its end."""
    cells = swept(config, folder)
    began = time.perf_counter()
    tracker = Tracker.start(config)
    opened = time.perf_counter()
    with tracker:
        with tracker.stage_run("sweep") as run:
            pass
        tracker.log_sweep(run, fingerprint, cells)
        queued = time.perf_counter()
    ended = time.perf_counter()
    assert tracker.store is not None
    finished = "attributes.status = 'FINISHED' and tags.stage = 'cell'"
    there = list(tracker.store.search(f"{finished} and tags.sweep_id = '{fingerprint}'"))
    curves = {
        (c.cell.drafter, c.cell.dataset, c.cell.context, c.cell.policy, c.cell.budget, c.cell.threshold)
        for c in cells
    }
    assert len(there) == len(curves), f"{len(there)} runs are in MLflow, of {len(curves)} curves"
    return Tracked(len(there), opened - began, queued - opened, ended - opened)


class Napper:
    """Sleeps for each item and returns the id of its process."""

    def __call__(self, item: int) -> int:
        time.sleep(NAP_S)
        return os.getpid()


def throughputs(nodes: Sequence[int]) -> dict[int, float]:
    """Items/s by the number of nodes."""
    from ray.cluster_utils import Cluster

    from jobs.executors.ray_executor import RayExecutor

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    rates: dict[int, float] = {}
    with TemporaryDirectory(prefix="bd") as folder:  # a short path, since it holds sockets
        # In the default folder this cluster would be the one that every `ray.init` on this machine joins.
        os.environ["RAY_TMPDIR"] = folder
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for wanted in nodes:
                while len(cluster.worker_nodes) < wanted:
                    cluster.add_node(num_cpus=1, object_store_memory=STORE)
                cluster.wait_for_nodes()
                run = {"executor": "ray", "ray_address": cluster.address, "device": "cpu"}
                with closing(RayExecutor(Config.model_validate(CONFIG | {"run": run}))) as executor:
                    naps = range(wanted * NAPS_PER_NODE)
                    given = executor.map_actors(Napper, naps, f"{wanted} nodes", wanted, "replay")
                    rates[wanted] = steady_rate([(pid, time.perf_counter()) for _, pid in given])
        finally:
            cluster.shutdown()
    return rates


def steady_rate(results: Sequence[tuple[int, float]]) -> float:
    """Results/s once every worker has given its first.

    Args:
        results: worker and time, in order of time.
    """
    firsts: dict[int, float] = {}
    for worker, at in results:
        firsts.setdefault(worker, at)
    start, end = max(firsts.values()), results[-1][1]
    return sum(at > start for _, at in results) / (end - start)


def apart(function: Callable[..., Result], *given: object) -> Result:
    """Call in a new process, whose memory and whose Ray are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()
