"""Families of drafters over training seeds and documents: how often each is accepted, and differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t

from benchmarks.study.runs import Study
from pipeline.axes import family
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.intervals import Interval, bootstrap_interval, seeded_difference
from pipeline.metrics import Number
from pipeline.results.pool import accepted_of_proposed, documents
from pipeline.store.rows import PromptRow

GAMMA, SMALLEST, SAMPLES, SEED = 4, 64, 2000, 42
RUNS = ("table-3", "ablations", "on-policy")

Counted = Callable[[Sequence[PromptRow]], tuple[list[Number], list[Number]]]
BySeed = Mapping[str, Mapping[str, PromptRow]]  # training seed → prompt → row
# (variant, data set, budget, temperature, control) → rows of all contexts.
Families = Mapping[tuple[str, str, int | str, float, str | None], BySeed]


def student(by_seed: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over several training seeds by Student's t, for the seeds' luck alone."""
    mean, error = fmean(by_seed), stdev(by_seed) / len(by_seed) ** 0.5
    reach = float(t.ppf(0.975, len(by_seed) - 1)) * error
    return mean - reach, mean + reach


class Change(NamedTuple):
    """Acceptance of one family minus another's: the mean over seeds with its interval, and each seed's.

    The interval resamples documents and training seeds. With few seeds it reaches no further than from the
    least of them to the greatest, so that it is too narrow where they differ much.
    """

    value: Interval
    by_seed: list[float]

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0, and with several seeds Student's t interval too; else 0."""
        low, high = self.value.low, self.value.high
        if len(self.by_seed) > 1:
            least, most = student(self.by_seed)
            low, high = min(low, least), max(high, most)
        return (low > 0) - (high < 0)

    @property
    def spread(self) -> float:
        """How far the seeds are apart; 0 for one seed."""
        return max(self.by_seed) - min(self.by_seed)


class Column(NamedTuple):
    """The rows that a figure is computed from: those of all contexts, or of one."""

    budget: int | str
    temperature: float
    control: str | None = None
    without_looping: bool = False
    context: str | None = None


def families_of(studies: Mapping[str, Study]) -> Families:
    """The families of the paper's experiments."""
    return grouped([studies[name] for name in RUNS], GAMMA)


def grouped(studies: Sequence[Study], gamma: int) -> Families:
    """Rows of one γ by family and training seed; a drafter that was not distilled stands under every seed.

    Every seed's training started from that drafter, so that it can be compared with all of them.
    """
    cells: dict[tuple[str, str, int | str, float, str | None], dict[str, dict[str, PromptRow]]] = {}
    for study in studies:
        drafters = study.config.train.drafters
        seeds = {drafter.name: seeds_of(drafter, study.config) for drafter in drafters}
        every = sorted({seed for drafter_seeds in seeds.values() for seed in drafter_seeds})
        seeds |= {drafter.name: every for drafter in drafters if drafter.steps == 0}
        for row in study.rows:
            if row.cell.gamma == gamma and row.counts.num_proposed:
                key = (
                    family(row.cell.drafter),
                    row.cell.dataset,
                    row.cell.budget,
                    row.cell.temperature,
                    row.cell.control,
                )
                by_seed = cells.setdefault(key, defaultdict(dict))
                for seed in seeds[row.cell.drafter]:
                    by_seed[seed][row.prompt_id] = row
    return cells


def seeds_of(drafter: Variant, config: Config) -> list[str]:
    return [str(seed) for seed in drafter.seeds or (config.seed,)]


def datasets_of(cells: Families) -> list[str]:
    return list(dict.fromkeys(dataset for _, dataset, *_ in cells))


def rows_of(cells: Families, name: str, dataset: str, column: Column) -> BySeed:
    by_seed = cells[name, dataset, column.budget, column.temperature, column.control]
    return {
        seed: {
            prompt: row
            for prompt, row in rows.items()
            if column.context in (None, row.cell.context) and not (column.without_looping and row.looping)
        }
        for seed, rows in by_seed.items()
    }


def accepted(cells: Families, name: str, dataset: str, column: Column) -> Interval:
    """Acceptance of a family, its training seeds pooled; the interval resamples documents."""
    by_seed = rows_of(cells, name, dataset, column)
    rows = [row for by_prompt in by_seed.values() for row in by_prompt.values()]
    return bootstrap_interval(
        *accepted_of_proposed(rows), samples=SAMPLES, seed=SEED, clusters=documents(rows)
    )


def change(
    cells: Families, name: str, dataset: str, column: Column, baseline: str = "multi_view"
) -> Change | None:
    """How much more one family is accepted than another; None where no text is left, as where all loop."""
    ours, theirs = (rows_of(cells, family_name, dataset, column) for family_name in (name, baseline))
    return difference(ours, theirs) if any(ours.values()) else None


def difference(ours: BySeed, theirs: BySeed, counted: Counted = accepted_of_proposed) -> Change:
    """One family minus another, over the seeds that both have and the prompts that all these drafters have.

    Args:
        counted: the numerators and denominators of the rate that is compared, of each row.

    Raises:
        ValueError: if they have no seed or no prompt in common.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    held = [set(side[seed]) for side in (ours, theirs) for seed in seeds]
    prompts = sorted(set.intersection(*held)) if held else []
    if not prompts:
        raise ValueError("two families have no training seed or no prompt in common")

    def counts(side: BySeed, seeds: Sequence[str]) -> tuple[list[list[Number]], list[list[Number]]]:
        pairs = [counted([side[seed][prompt] for prompt in prompts]) for seed in seeds]
        return [accepted for accepted, _ in pairs], [proposed for _, proposed in pairs]

    clusters = [ours[seeds[0]][prompt].document_id for prompt in prompts]
    pooled, *singles = (
        seeded_difference(
            counts(ours, group), counts(theirs, group), samples=SAMPLES, seed=SEED, clusters=clusters
        )
        for group in (seeds, *([seed] for seed in seeds))
    )
    return Change(pooled, [single.mean for single in singles])
