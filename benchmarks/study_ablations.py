"""What each change to multi_view is worth: differences over training seeds and documents, and in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.page_parts import markdown, points
from pipeline.config_sweep import family
from pipeline.metrics import seeded_difference
from pipeline.rows import Count, PromptRow

if TYPE_CHECKING:
    from benchmarks.study import Study

GAMMA, SMALLEST, SAMPLES, SEED = 4, 64, 2000, 42
CHANGES = {
    "full_only": "L_A only, no sparse branch (Table 3)",
    "lambda_1": "λ = 1 instead of 0.5 (Table 3)",
    "single_budget": "one fixed budget, 256 (Table 3)",
    "one_view": "one budget drawn per step instead of two",
    "four_views": "four budgets drawn per step",
    "with_b_0": "B = 0 among the trained budgets",
    "kl": "forward KL in both branches",
    "total_variation": "total variation in both branches",
    "rope_linear": "linear RoPE scaling by 4, distilled so",
    "on_policy": "a quarter of the labels on the target's own sampled text",
}
HOW = (0.0, "greedily"), (1.0, "at temperature 1")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % points of t for so many training seeds

BySeed = Mapping[str, Mapping[str, PromptRow]]  # training seed → prompt →
# Variant, data set, budget, temperature and control →; the contexts of a data set are pooled.
Families = Mapping[tuple[str, str, int | str, float, str | None], BySeed]


class Change(NamedTuple):
    """A changed family minus multi_view: the mean over training seeds with its interval, and each seed's.

    The interval resamples documents and training seeds. Of few seeds it reaches no further than from the
    least to the greatest of them, and is too narrow where they differ much.
    """

    mean: float
    low: float
    high: float
    by_seed: list[float]

    @property
    def sign(self) -> int:
        """1 or -1 where this interval, and of several seeds Student's t too, leave out 0; else 0."""
        low, high = self.low, self.high
        if (seeds := len(self.by_seed)) > 1:
            reach = STUDENT[seeds] * stdev(self.by_seed) / seeds**0.5
            low, high = min(low, fmean(self.by_seed) - reach), max(high, fmean(self.by_seed) + reach)
        return (low > 0) - (high < 0)

    @property
    def spread(self) -> float:
        """How far the seeds are apart; 0 of one seed."""
        return max(self.by_seed) - min(self.by_seed)


Ablation = tuple[str, str, dict[str, Change]]  # variant, data set, column → where there are prompts


class Column(NamedTuple):
    """One difference that the table shows."""

    budget: int | str
    temperature: float
    control: str | None = None
    without_looping: bool = False


COLUMNS = {
    f"B = {SMALLEST}, greedy": Column(SMALLEST, 0.0),
    "without looping texts": Column(SMALLEST, 0.0, without_looping=True),
    "under other_prompt": Column(SMALLEST, 0.0, "other_prompt"),
    f"B = {SMALLEST}, T = 1": Column(SMALLEST, 1.0),
    "T = 1 under other_prompt": Column(SMALLEST, 1.0, "other_prompt"),
    "full, greedy": Column("full", 0.0),
    "full, T = 1": Column("full", 1.0),
}


def families_of(studies: Mapping[str, Study]) -> Families:
    cells: dict[tuple[str, str, int | str, float, str | None], dict[str, dict[str, PromptRow]]] = {}
    for study in (studies[name] for name in ("table-3", "ablations", "on-policy")):
        drafters = study.config.train.drafters
        seeds = {one.name: str(one.seeds[0] if one.seeds else study.config.seed) for one in drafters}
        for row in study.rows:
            if row.gamma == GAMMA and row.num_proposed:
                key = family(row.drafter), row.dataset, row.budget, row.temperature, row.control
                cells.setdefault(key, defaultdict(dict))[seeds[row.drafter]][row.prompt_id] = row
    return cells


def change(cells: Families, name: str, dataset: str, column: Column) -> Change | None:
    """What one changed family is accepted more than `multi_view`; None where every text loops."""
    where = column.budget, column.temperature, column.control
    ours, theirs = (cells[one, dataset, *where] for one in (name, "multi_view"))
    if column.without_looping:
        ours, theirs = (
            {seed: {p: row for p, row in rows.items() if not row.looping} for seed, rows in side.items()}
            for side in (ours, theirs)
        )
        if not any(ours.values()):
            return None
    return difference(ours, theirs)


def difference(ours: BySeed, theirs: BySeed) -> Change:
    """Two families over the training seeds that both have and the prompts that all of these drafters hold.

    Raises:
        ValueError: if they have no seed or no prompt in common.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    held = [set(side[seed]) for side in (ours, theirs) for seed in seeds]
    prompts = sorted(set.intersection(*held)) if held else []
    if not prompts:
        raise ValueError("two families have no training seed or no prompt in common")

    def counts(side: BySeed, seeds: Sequence[str]) -> tuple[list[list[Count]], list[list[Count]]]:
        rows = [[side[seed][prompt] for prompt in prompts] for seed in seeds]
        accepted = [[row.num_accepted for row in one] for one in rows]
        return accepted, [[row.num_proposed or 0 for row in one] for one in rows]

    clusters = [ours[seeds[0]][prompt].document_id for prompt in prompts]
    pooled, *single = (
        seeded_difference(
            counts(ours, some), counts(theirs, some), samples=SAMPLES, seed=SEED, clusters=clusters
        )
        for some in (seeds, *([seed] for seed in seeds))
    )
    return Change(pooled.mean, pooled.low, pooled.high, [one.mean for one in single])


def ablation_rows(cells: Families) -> list[Ablation]:
    datasets = dict.fromkeys(dataset for _, dataset, *_ in cells)
    rows = []
    for name, dataset in product(CHANGES, datasets):
        found = {head: change(cells, name, dataset, column) for head, column in COLUMNS.items()}
        rows.append((name, dataset, {head: one for head, one in found.items() if one}))
    return rows


def ablation_table(rows: Sequence[Ablation]) -> str:
    return markdown(
        ["drafter", "what differs", "data", *COLUMNS],
        [
            [f"`{name}`", CHANGES[name], data, *(points(cells[h]) if h in cells else "" for h in COLUMNS)]
            for name, data, cells in rows
        ],
    )


def ablation_words(rows: Sequence[Ablation]) -> str:
    """Plainly, which changes help and which do not, behind the smallest budget."""
    heads = [next(h for h, c in COLUMNS.items() if c == Column(SMALLEST, t)) for t, _ in HOW]
    lines = []
    for name in dict.fromkeys(name for name, _, _ in rows):
        parts = []
        for head, (_, how) in zip(heads, HOW, strict=True):
            told = {dataset: cells[head] for other, dataset, cells in rows if other == name}
            means = [one.mean for one in told.values()]
            spread = max(one.spread for one in told.values())
            several = any(len(one.by_seed) > 1 for one in told.values())
            seeds = f"seeds up to {100 * spread:.1f} apart" if several else "one seed"
            parts.append(
                f"{verdict(told)} {how} ({100 * min(means):+.1f} to {100 * max(means):+.1f} points, {seeds})"
            )
        lines.append(f"- `{name}`, {CHANGES[name]}: {parts[0]}; {parts[1]}")
    return "\n".join(lines)


def seed_spread(rows: Sequence[Ablation]) -> float:
    """The widest that seeds of one change are apart behind the smallest budget."""
    shown = Column(SMALLEST, 0.0), Column(SMALLEST, 1.0)
    heads = [head for head, column in COLUMNS.items() if column in shown]
    return max(cells[head].spread for _, _, cells in rows for head in heads)


def verdict(told: Mapping[str, Change]) -> str:
    """From what is clear in each data set; they share the drafters, and so the luck of the seeds."""
    up, down = ([dataset for dataset, one in told.items() if one.sign == sign] for sign in (1, -1))
    if len(up) >= 2 and not down:
        return "helps"
    if len(down) >= 2 and not up:
        return "hurts"
    if not up and not down:
        return "makes no clear difference"
    return "is clear only in " + ", ".join([*(f"{d} (up)" for d in up), *(f"{d} (down)" for d in down)])


def nothing_kept(cells: Families) -> str:
    """What B = 0 among the trained budgets is worth where nothing of the prefix is kept."""
    datasets = dict.fromkeys(dataset for _, dataset, *_ in cells)
    parts = []
    for temperature, how in HOW:
        found = {data: change(cells, "with_b_0", data, Column(0, temperature)) for data in datasets}
        told = ", ".join(f"{points(one)} ({data})" for data, one in found.items() if one)
        parts.append(f"{how} {told}")
    return "; ".join(parts)
