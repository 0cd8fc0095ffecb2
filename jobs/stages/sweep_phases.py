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
from pipeline.train.teacher import sampled_name

log = logging.getLogger(__name__)

PROMPTS_PER_TASK = 8


class Phases:
    """The phases of one sweep, each of them a list of tasks; what is done is not done again."""

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
    ) -> None:
        self.config, self.sweep, self.executor, self.folder = config, config.sweep, executor, artifact.path
        self.greedy = teach.path / CONTINUATIONS
        self.sampled = sample.path / CONTINUATIONS if sample else None
        files = sorted((prepare.path / PROMPTS).glob("test-*.jsonl"))
        self.files = [file for file in files if read_rows(file, Prompt)]
        warn_of_large_budgets(config)
        self.drafters, self.rows, self.failures = drafters, 0, 0
        self.factory = partial(make_evaluator, config, target, drafters, prepare.path / TOKENIZER)

    def all(self) -> None:
        """Every phase that the config asks for."""
        if self.sweep.mode != "measure":
            self.replay()
        if self.sweep.predicts and not self.failures:
            self.calibrate()
        # What predictions point at is decided once, so only from whole rows; and what would be measured
        # before they point would be measured again.
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
        """Timings are taken by one worker at a time, so that they do not disturb each other.

        What an earlier run has left is counted here: an evaluator would load all models to read a file.
        """
        found = {task.output: done for task in tasks if (done := earlier(task))}
        missing = [task for task in tasks if task.output not in found]
        results: Iterable[tuple[SweepTask, Evaluated]] = ()
        if missing:
            results = self.executor.map_actors(self.factory, missing, what, actors, work, self.give_up)
        # What was found comes last: Ray's metrics hear nothing before Ray runs.
        for done in chain((result for _, result in results), found.values()):
            self.rows, self.failures = self.rows + done.rows, self.failures + done.failed
            tell(done)

    def give_up(self, task: SweepTask, why: str) -> Evaluated:
        """A task that killed its worker each time is a failure of all its prompts; the others go on."""
        if isinstance(task, CalibrateTask):
            log.error("sweep: no steps were timed at %s: %s", task.context, why)
            return Evaluated(failed=1)
        prompts = read_rows(task.prompts, Prompt)[task.first : task.last]
        mode: Mode = "replay" if isinstance(task, ReplayTask) else "measure"
        error = Incomplete(f"its worker died each time: {why}")
        write_rows(
            failures_of(task),
            [
                make_failure(mode, all_cells(self.sweep, one, prompt), prompt, error)
                for one in self.drafters
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
        """What the config names, what predictions point at, and the plane that scores them."""
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
        """Measure the fastest cells of each place twice more, since they were found fastest by luck too.

        The run-off picks one; what its speed is, only the repeats behind it can say.
        """
        config = self.config
        rows = [row for row in self.done_rows() if row.mode == "measure"]
        cells = cell_rows(rows, Axes.of(config), config.report.bootstrap_samples, config.seed)
        found = choices(cells, run_off=[], again=[])
        picks = {}
        for file, place in self.places():
            fastest = found.get(place, [])[:FASTEST_MEASURED]
            picks[file] = tuple(choice.cell for choice in fastest)
        repeats = REPEATS_AGAIN * self.sweep.measure.repeats
        for what in MEASURED_AGAIN:
            # Greedily, at which the fastest were found.
            self.run(self.measure_tasks(picks, what, what, repeats, (0.0,)), what)

    def places(self) -> list[tuple[Path, Place]]:
        """Prompts files with the data set and context that they are of."""
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
        """The first prompts of every file, those decoded together a task.

        A file of rows is named by what is measured and how, and those of other picks, which an earlier run
        has left, are removed.
        """
        tasks, places = [], dict(self.places())
        for file, here in picks.items():
            picked = sha256(repr((here, repeats, temperatures)).encode()).hexdigest()[:6]
            prompts = len(read_rows(file, Prompt)) if here else 0
            for first, last in batches(self.sweep.measure, prompts):
                output = self.output(f"{what}-{picked}", file, first, folder)
                beside = self.beside(places[file], output)
                tasks.append(MeasureTask(file, here, repeats, temperatures, first, last, output, beside))
        wanted = {task.output.name for task in tasks}
        for kind in (folder, STEPS_BESIDE, FAILED):
            for old in (self.folder / kind).glob(f"{what}-*.jsonl"):
                if old.name not in wanted:
                    old.unlink()
        return tasks

    def beside(self, place: Place, output: Path) -> CalibrateTask | None:
        """Where `output` is of the plane, single steps of its context, to be timed around what it holds.

        Predictions are of seconds, and so is their score: a machine that others share may be a third slower
        some minutes after single steps were first timed.
        """
        if output.parent.name != ROWS or not has_plane(self.sweep, place):
            return None
        length = self.config.data.context_tokens[place.context]
        return CalibrateTask(place.context, length, self.folder / STEPS_BESIDE / output.name)

    def output(self, what: str, file: Path, first: int, folder: str = ROWS) -> Path:
        return self.folder / folder / f"{what}-{file.stem.removeprefix('test-')}-{first:05d}.jsonl"

    def done_rows(self) -> Iterator[PromptRow]:
        """File by file: the replayed rows of a large grid are gigabytes."""
        for file in sorted((self.folder / ROWS).glob("*.jsonl")):
            yield from read_rows(file, PromptRow)

    def times(self) -> list[StepTimes]:
        return read_all(self.folder / STEPS, StepTimes)


def warn_of_large_budgets(config: Config) -> None:
    """Where nothing is left out, a budget's rows are those of the full cache."""
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
