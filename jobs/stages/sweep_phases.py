"""The phases of a sweep: replay, step times, predictions, wall clock, run-off."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

from jobs.executors.base import Executor
from jobs.stages.teach import sampled_chances
from pipeline.axes import Cell, Place
from pipeline.config.data import Split
from pipeline.config.run import Work
from pipeline.config.schema import Config
from pipeline.errors import Incomplete
from pipeline.models.load import ModelRef, pick_device
from pipeline.observe.events import Evaluated, tell
from pipeline.results.axes import Axes
from pipeline.results.pool import cell_rows
from pipeline.results.recommend import choices
from pipeline.store.artifacts import Artifact
from pipeline.store.files import read_all, read_rows, write_rows
from pipeline.store.layout import (
    CONTINUATIONS,
    FAILED,
    MEASURED_AGAIN,
    PICKS,
    PREDICTED,
    PROMPTS,
    ROWS,
    STEPS,
    STEPS_BESIDE,
    TOKENIZER,
)
from pipeline.store.rows import Mode, PickedCell, Prompt, PromptRow, StepTimes
from pipeline.sweep import predict
from pipeline.sweep.counts import count_sweep
from pipeline.sweep.evaluator import (
    CalibrateTask,
    Evaluator,
    MeasureTask,
    ReplayTask,
    SweepTask,
    earlier,
    failures_of,
)
from pipeline.sweep.grid import Drafter
from pipeline.sweep.make_rows import all_cells, make_failure
from pipeline.sweep.picks import (
    FASTEST_MEASURED,
    REPEATS_AGAIN,
    batches,
    by_place,
    first_seeds,
    has_plane,
    measures_again,
    picks_at,
    timed_temperatures,
    unranked,
    worth_measuring,
)
from pipeline.train.target.teacher import sampled_name

log = logging.getLogger(__name__)

PROMPTS_PER_TASK = 8


class Phases:
    """The phases of one sweep, each of them a list of tasks; tasks that are done are not run again."""

    def __init__(
        self,
        config: Config,
        executor: Executor,
        prepare: Artifact,
        teach: Artifact,
        sample: Artifact | None,
        artifact: Artifact,
        target: ModelRef,
        drafters: list[Drafter],
        split: Split = "test",
    ) -> None:
        self.split = split
        self.config, self.sweep, self.executor, self.folder = config, config.sweep, executor, artifact.path
        self.greedy = teach.path / CONTINUATIONS
        self.sampled = sample.path / CONTINUATIONS if sample else None
        files = sorted((prepare.path / PROMPTS).glob(f"{split}-*.jsonl"))
        self.files = [file for file in files if read_rows(file, Prompt)]
        warn_of_large_budgets(config)
        self.drafters, self.rows, self.failures = drafters, 0, 0
        self.factory = partial(make_evaluator, config, target, drafters, prepare.path / TOKENIZER)

    def all(self) -> None:
        """Every phase that the config asks for."""
        counts = count_sweep(
            self.config, {place: len(read_rows(file, Prompt)) for file, place in self.places()}
        )
        log.info(
            "sweep: at most %d cells, with %d rows of replay, %d measured and %d measured again",
            *(counts.cells, counts.replayed, counts.measured, counts.rechecked),
        )
        if self.sweep.mode != "measure":
            self.replay()
        if self.sweep.predicts and not self.failures:
            self.calibrate()
        # Predictions pick cells to measure once, so they need all rows; cells that are measured before the
        # picks are made would be measured again.
        if self.sweep.predicts and self.failures:
            log.warning(
                "sweep: speeds are predicted and measured when every prompt is replayed and the steps of "
                "every context are timed, so not in this run"
            )
        elif self.sweep.mode != "replay":
            self.measure()
        if measures_again(self.sweep) and not self.failures:
            self.recheck()

    def run(self, tasks: Sequence[SweepTask], what: str, work: Work = "measure", actors: int = 1) -> None:
        """Run a phase's tasks. Timings have one worker at a time, so that they do not disturb each other.

        Results of an earlier run are counted here: an evaluator would load all models to read a file.
        """
        finished = {task.output: done for task in tasks if (done := earlier(task))}
        missing = [task for task in tasks if task.output not in finished]
        results: Iterable[tuple[SweepTask, Evaluated]] = ()
        if missing:
            results = self.executor.map_actors(self.factory, missing, what, actors, work, self.give_up)
        # Results of an earlier run come last: Ray's metrics hear nothing before Ray runs.
        for done in chain((result for _, result in results), finished.values()):
            self.rows, self.failures = self.rows + done.rows, self.failures + done.failed
            tell(done)

    def give_up(self, task: SweepTask, why: str) -> Evaluated:
        """A task that killed its worker each time is a failure of all its prompts; the other tasks go on."""
        if isinstance(task, CalibrateTask):
            log.error("sweep: no steps were timed at %s: %s", task.context, why)
            return Evaluated(failed=1)
        prompts = read_rows(task.prompts, Prompt)[task.first : task.last]
        mode: Mode = "replay" if isinstance(task, ReplayTask) else "measure"
        error = Incomplete(f"its worker died each time: {why}")
        write_rows(
            failures_of(task),
            [
                make_failure(mode, all_cells(self.sweep, drafter, prompt), prompt, error)
                for drafter in self.drafters
                for prompt in prompts
            ],
        )
        return Evaluated(failed=len(self.drafters) * len(prompts))

    def replay(self) -> None:
        tasks = []
        for file in self.files:
            texts = [self.greedy / file.name] if 0.0 in self.sweep.temperatures else []
            if self.sampled:
                names = [sampled_name(file.name, chance) for chance in sampled_chances(self.config)]
                texts += [self.sampled / name for name in names]
            count = len(read_rows(file, Prompt))
            for first in range(0, count, PROMPTS_PER_TASK):
                last = min(first + PROMPTS_PER_TASK, count)
                tasks.append(ReplayTask(file, tuple(texts), first, last, self.output("replay", file, first)))
        self.run(tasks, "replay", "replay", self.sweep.num_evaluators)

    def calibrate(self) -> None:
        """Time steps at every context, then predict. Predictions are made once, and picks with them."""
        contexts = self.config.data.context_tokens
        tasks = [
            CalibrateTask(n, tokens, self.folder / STEPS / f"{n}.jsonl") for n, tokens in contexts.items()
        ]
        self.run(tasks, "calibrate")
        if self.failures:  # without the steps of a context its cells would never be predicted
            return
        if not ((self.folder / PICKS).exists() and (self.folder / PREDICTED).exists()):
            report = self.config.report
            predicted = predict.predict(
                self.done_rows(),
                self.times(),
                report.bootstrap_samples,
                self.config.seed,
            )
            write_rows(self.folder / PREDICTED, predicted)
            places = by_place(predicted)
            firsts = first_seeds([drafter.name for drafter in self.drafters])
            ranked = ([row.cell for row in here] for here in places.values())
            picks = [cell for cells in ranked for cell in worth_measuring(cells, firsts)]
            write_rows(self.folder / PICKS, [PickedCell(cell=cell) for cell in picks])

    def measure(self) -> None:
        """Measure cells that the config names or predictions pick, and the plane that scores predictions."""
        picked = self.folder / PICKS
        extra = [row.cell for row in read_rows(picked, PickedCell)] if picked.exists() else []
        picks = {}
        for file, place in self.places():
            here = [cell for cell in extra if cell.place == place]
            picks[file] = picks_at(self.sweep, self.drafters, place, here)
        if why := unranked(self.config):
            log.warning("%s", why)
        repeats, at = self.sweep.measure.repeats, timed_temperatures(self.sweep)
        self.run(self.measure_tasks(picks, "measure", ROWS, repeats, at), "measure")

    def recheck(self) -> None:
        """Measure the fastest cells of each place twice more, since luck had a part in their being fastest.

        The run-off picks one of them; only the repeats after the run-off can say what its speed is.
        """
        config = self.config
        rows = [row for row in self.done_rows() if row.mode == "measure"]
        cells = cell_rows(rows, Axes.of(config), config.report.bootstrap_samples, config.seed)
        ranked = choices(cells, run_off=[], again=[])
        picks = {}
        for file, place in self.places():
            fastest = ranked.get(place, [])[:FASTEST_MEASURED]
            picks[file] = tuple(choice.cell for choice in fastest)
        repeats = REPEATS_AGAIN * self.sweep.measure.repeats
        for what in MEASURED_AGAIN:
            # Greedily, as the fastest were found.
            self.run(self.measure_tasks(picks, what, what, repeats, (0.0,)), what)

    def places(self) -> list[tuple[Path, Place]]:
        """Every file of prompts, with its place."""
        firsts = [(file, read_rows(file, Prompt)[0]) for file in self.files]
        return [(file, Place(prompt.dataset, prompt.context)) for file, prompt in firsts]

    def measure_tasks(
        self,
        picks: dict[Path, tuple[Cell, ...]],
        what: str,
        folder: str,
        repeats: int,
        temperatures: tuple[float, ...],
    ) -> list[MeasureTask]:
        """Tasks for the first prompts of every file; prompts that are decoded together share a task.

        A file of rows is named by what is measured and how. Files of other picks, which an earlier run has
        left, are removed.
        """
        tasks, places = [], dict(self.places())
        for file, here in picks.items():
            picked = sha256(repr((here, repeats, temperatures)).encode()).hexdigest()[:6]
            prompts = len(read_rows(file, Prompt)) if here else 0
            for first, last in batches(self.sweep.measure, prompts):
                output = self.output(f"{what}-{picked}", file, first, folder)
                steps = self.steps_beside(places[file], output)
                tasks.append(MeasureTask(file, here, repeats, temperatures, first, last, output, steps))
        wanted = {task.output.name for task in tasks}
        for kind in (folder, STEPS_BESIDE, FAILED):
            for old in (self.folder / kind).glob(f"{what}-*.jsonl"):
                if old.name not in wanted:
                    old.unlink()
        return tasks

    def steps_beside(self, place: Place, output: Path) -> CalibrateTask | None:
        """If `output` is of the plane, a task that times single steps of its context before and after it.

        Predictions are scored in seconds, and a machine that others share may be a third slower some minutes
        after single steps were first timed.
        """
        if output.parent.name != ROWS or not has_plane(self.sweep, place):
            return None
        length = self.config.data.context_tokens[place.context]
        return CalibrateTask(place.context, length, self.folder / STEPS_BESIDE / output.name)

    def output(self, what: str, file: Path, first: int, folder: str = ROWS) -> Path:
        name = file.stem.removeprefix(f"{self.split}-")
        return self.folder / folder / f"{what}-{name}-{first:05d}.jsonl"

    def done_rows(self) -> Iterator[PromptRow]:
        """All rows, file by file: the replayed rows of a large grid are gigabytes."""
        for file in sorted((self.folder / ROWS).glob("*.jsonl")):
            yield from read_rows(file, PromptRow)

    def times(self) -> list[StepTimes]:
        return read_all(self.folder / STEPS, StepTimes)


def warn_of_large_budgets(config: Config) -> None:
    """Warn of budgets that keep a whole context: their rows are those of the full cache."""
    for context in config.data.contexts:
        large = [b for b in config.sweep.budgets if b != "full" and b >= context.tokens]
        if large:
            log.warning(
                "sweep: sweep.budgets %s keep all of the %d tokens of context %s, as full does",
                large,
                context.tokens,
                context.name,
            )


def make_evaluator(config: Config, target: ModelRef, drafters: list[Drafter], tokenizer: Path) -> Evaluator:
    return Evaluator(config, target, drafters, tokenizer, pick_device(config.run.device))
