"""Tables of the stage report: prompt rows pooled into cells, acceptance, speed and exactness.

`CellRow` (one line of `cells.jsonl`) is one cell in one mode. Data sets, contexts and policies are never
averaged together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline import metrics
from pipeline.config import Config
from pipeline.errors import BadData
from pipeline.report.summary import ArSpeed, Budget, Estimate, Lossless, ReplayCheck
from pipeline.rows import Cell, CellRow, PromptRow

Mode = Literal["replay", "measure"]


class CellKey(NamedTuple):
    """The fields of `Cell`, as something cheap to hash and to vary."""

    drafter: str
    dataset: str
    context: str
    policy: str
    budget: Budget
    control: str | None
    gamma: int
    threshold: float
    temperature: float
    seed: int

    @staticmethod
    def of(row: Cell) -> CellKey:
        return CellKey(
            row.drafter, row.dataset, row.context, row.policy, row.budget,
            row.control, row.gamma, row.threshold, row.temperature, row.seed,
        )  # fmt: skip


PromptRows = dict[str, PromptRow]  # one cell's rows by prompt_id


@dataclass(frozen=True)
class Axes:
    """What the config says about the sweep's axes: their order, and the points that the report leads with."""

    drafters: tuple[str, ...]
    datasets: tuple[str, ...]
    contexts: dict[str, int]  # name → prompt tokens
    gamma: int  # the γ of figures and findings that show one
    smallest_budget: int | None  # above 0; None where only the full cache is swept
    trained_without_prefix: tuple[str, ...]  # drafters that saw B = 0 in training

    @staticmethod
    def of(config: Config) -> Axes:
        wanted = config.train.validation_gamma
        return Axes(
            drafters=tuple(v.name for v in config.train.drafters),
            datasets=tuple(s.name for s in config.data.sources if "test" in s.use),
            contexts={c.name: c.tokens for c in config.data.contexts},
            gamma=min(config.sweep.gammas, key=lambda gamma: (abs(gamma - wanted), gamma)),
            smallest_budget=min((b for b in config.sweep.budgets if b != "full" and b > 0), default=None),
            trained_without_prefix=tuple(v.name for v in config.train.drafters if 0 in v.budgets),
        )

    def order(self, cell: Cell) -> tuple[float | str, ...]:
        """Sort key: data set, context, policy and drafter as the config lists them, budgets ascending."""
        return (
            self.datasets.index(cell.dataset), self.contexts[cell.context], cell.context, cell.policy,
            self.drafters.index(cell.drafter), cell.temperature, cell.seed, cell.control or "",
            budget_order(cell.budget), cell.gamma, cell.threshold,
        )  # fmt: skip


def budget_order(budget: Budget) -> float:
    return math.inf if budget == "full" else budget


def budget_text(budget: Budget) -> str:
    return "the full cache" if budget == "full" else f"B = {budget}"


def group(rows: Iterable[PromptRow], mode: Mode) -> dict[CellKey, PromptRows]:
    """Rows of one mode by cell and prompt.

    Raises:
        BadData: if a prompt occurs twice in a cell.
    """
    cells: dict[CellKey, PromptRows] = defaultdict(dict)
    for row in rows:
        if row.mode != mode:
            continue
        prompts = cells[CellKey.of(row)]
        if row.prompt_id in prompts:
            raise BadData(
                f"the sweep holds prompt {row.prompt_id!r} twice for {CellKey.of(row)} ({mode}): delete its "
                "rows/ folder and run the stage sweep again"
            )
        prompts[row.prompt_id] = row
    return dict(cells)


def replayed_or_measured(rows: Sequence[PromptRow]) -> dict[CellKey, PromptRows]:
    """Rows by cell and prompt: the replay's where there are any (they are more), else the measured ones.

    Without the cells that stop drafting early: what they propose depends on the drafter's confidence, so that
    their acceptance compares with nothing.
    """
    cells = group(rows, "measure") | group(rows, "replay")
    return {key: prompts for key, prompts in cells.items() if not key.threshold}


def accepted_of_proposed(rows: Sequence[PromptRow]) -> tuple[list[int], list[int]]:
    return [row.num_accepted for row in rows], [row.num_proposed for row in rows]


def cell_rows(prompt_rows: Sequence[PromptRow], axes: Axes, samples: int, seed: int) -> list[CellRow]:
    """Pool the prompts of every cell and mode, in the order of `axes`.

    A cell in which nothing was proposed, because every continuation ended at once, has no acceptance and is
    left out; the findings count such cells.
    """
    modes: tuple[Mode, ...] = ("replay", "measure")
    cells = [
        _cell_row(key, mode, list(rows.values()), samples, seed)
        for mode in modes
        for key, rows in group(prompt_rows, mode).items()
        if any(row.num_proposed for row in rows.values())
    ]
    return sorted(cells, key=axes.order)


def _cell_row(key: CellKey, mode: Mode, rows: list[PromptRow], samples: int, seed: int) -> CellRow:
    accepted, proposed = accepted_of_proposed(rows)
    acceptance = metrics.bootstrap_interval(accepted, proposed, samples=samples, seed=seed)
    varied = [row for row in rows if not row.looping and row.num_proposed]
    compared = [row for row in rows if row.exact is not None]
    cell = CellRow(
        **key._asdict(),
        mode=mode,
        num_prompts=len(rows),
        num_documents=len({row.document_id for row in rows}),
        num_looping=sum(row.looping for row in rows),
        acceptance=acceptance.mean,
        acceptance_low=acceptance.low,
        acceptance_high=acceptance.high,
        acceptance_not_looping=(
            sum(r.num_accepted for r in varied) / sum(r.num_proposed for r in varied) if varied else None
        ),
        mean_tokens_per_round=sum(row.num_tokens for row in rows) / sum(row.num_rounds for row in rows),
        conditional_acceptance=metrics.conditional_acceptance(
            [row.reached for row in rows], [row.kept for row in rows]
        ),
        in_trained_range=all(row.in_trained_range for row in rows),
        drafter_kv_bytes=max(row.drafter_kv_bytes for row in rows),
        target_kv_bytes=_most(row.target_kv_bytes for row in rows),
        exact_prompts=sum(row.exact is True for row in compared) if compared else None,
        peak_memory_bytes=_most(row.peak_memory_bytes for row in rows),
    )
    return cell.model_copy(update=_speed(key, rows, samples, seed)) if mode == "measure" else cell


def _most(values: Iterable[int | None]) -> int | None:
    """The largest of the values that were taken; None where none was."""
    taken = [value for value in values if value is not None]
    return max(taken) if taken else None


def _speed(key: CellKey, rows: list[PromptRow], samples: int, seed: int) -> dict[str, float | None]:
    """The speed fields of a measured cell."""
    repeats = len(rows[0].decode_s)
    for row in rows:
        if not repeats or not row.ar_num_tokens or {len(row.decode_s), len(row.ar_decode_s)} != {repeats}:
            raise BadData(
                f"the measured prompt {row.prompt_id!r} of {key} needs ar_num_tokens, and one time per "
                "repeat in decode_s and ar_decode_s, as many as the cell's other prompts: delete the "
                "measured rows in the sweep's folder and run the stage again"
            )
    tokens, ar_tokens = [row.num_tokens for row in rows], [row.ar_num_tokens or 0 for row in rows]
    # Prompts that were decoded together share one clock: they are one unit of the bootstrap.
    units: dict[str, list[PromptRow]] = defaultdict(list)
    for row in rows:
        units[row.together_with or row.prompt_id].append(row)
    speed = metrics.speedup(
        (
            [sum(row.num_tokens for row in unit) for unit in units.values()],
            [_sums(row.decode_s for row in unit) for unit in units.values()],
        ),
        (
            [sum(row.ar_num_tokens or 0 for row in unit) for unit in units.values()],
            [_sums(row.ar_decode_s for row in unit) for unit in units.values()],
        ),
        samples=samples,
        seed=seed,
    )
    decode_s = sum(sum(row.decode_s) for row in rows) / repeats
    ar_decode_s = sum(sum(row.ar_decode_s) for row in rows) / repeats
    prefill_s, ar_prefill_s = _total(row.prefill_s for row in rows), _total(row.ar_prefill_s for row in rows)
    end_to_end = None
    if prefill_s is not None and ar_prefill_s is not None:
        rate, ar_rate = sum(tokens) / (prefill_s + decode_s), sum(ar_tokens) / (ar_prefill_s + ar_decode_s)
        end_to_end = rate / ar_rate
    return {
        "speedup": speed.overall.mean,
        "speedup_low": speed.overall.low,
        "speedup_high": speed.overall.high,
        "worst_prompt_speedup": speed.worst_prompt,
        "end_to_end_speedup": end_to_end,
        "tokens_per_s": sum(tokens) / decode_s,
        "ar_tokens_per_s": sum(ar_tokens) / ar_decode_s,
    }


def _sums(times: Iterable[list[float]]) -> list[float]:
    """Repeat by repeat."""
    return [sum(repeat) for repeat in zip(*times, strict=True)]


def _total(values: Iterable[float | None]) -> float | None:
    """The sum, or None where a value is missing."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def estimates(cells: Sequence[CellRow], what: Literal["acceptance", "speedup"]) -> list[Estimate]:
    """Acceptance of every cell (the replay's where there is one: it has more prompts), or its speedup."""
    chosen: dict[CellKey, CellRow] = {}
    for cell in cells:
        wanted = cell.speedup is not None if what == "speedup" else not cell.threshold
        if wanted and (cell.mode == "replay" or CellKey.of(cell) not in chosen):
            chosen[CellKey.of(cell)] = cell
    return [
        Estimate(
            **key._asdict(),
            mean=getattr(cell, what),
            low=getattr(cell, f"{what}_low"),
            high=getattr(cell, f"{what}_high"),
            num_prompts=cell.num_prompts,
        )
        for key, cell in chosen.items()
    ]


def ar_speeds(prompt_rows: Sequence[PromptRow], axes: Axes, samples: int, seed: int) -> list[ArSpeed]:
    """AR decode speed per data set, context and temperature, every interleaved run of a prompt counted."""
    places: dict[tuple[str, str, float], dict[str, list[PromptRow]]] = defaultdict(lambda: defaultdict(list))
    for row in prompt_rows:
        if row.ar_decode_s:
            places[row.dataset, row.context, row.temperature][row.prompt_id].append(row)
    speeds = []
    for (dataset, context, temperature), prompts in places.items():
        tokens = [
            sum((row.ar_num_tokens or 0) * len(row.ar_decode_s) for row in rows) for rows in prompts.values()
        ]
        seconds = [sum(sum(row.ar_decode_s) for row in rows) for rows in prompts.values()]
        speed = metrics.bootstrap_interval(tokens, seconds, samples=samples, seed=seed)
        speeds.append(
            ArSpeed(
                dataset=dataset, context=context, temperature=temperature,
                mean=speed.mean, low=speed.low, high=speed.high, num_prompts=len(prompts),
            )
        )  # fmt: skip
    order = {name: index for index, name in enumerate(axes.datasets)}
    return sorted(speeds, key=lambda s: (order[s.dataset], axes.contexts[s.context], s.temperature))


def lossless(prompt_rows: Sequence[PromptRow]) -> Lossless:
    exact: dict[tuple[str, str, str], bool] = {}
    excused: dict[tuple[str, str, str], bool] = {}
    for row in prompt_rows:
        if row.temperature == 0 and row.exact is not None:
            prompt = (row.dataset, row.context, row.prompt_id)
            exact[prompt] = exact.get(prompt, True) and row.exact
            near_tie = row.exact or (row.divergence_gap or 0.0) < (row.logit_noise or 0.0)
            excused[prompt] = excused.get(prompt, True) and near_tie
    explained = sum(excused[prompt] and not exact[prompt] for prompt in exact)
    return Lossless(prompts=len(exact), exact=sum(exact.values()), explained=explained)


def replay_check(prompt_rows: Sequence[PromptRow]) -> ReplayCheck:
    replayed = group(prompt_rows, "replay")
    pairs = [
        (row, replayed[key][prompt])
        for key, prompts in group(prompt_rows, "measure").items()
        for prompt, row in prompts.items()
        if key.temperature == 0 and prompt in replayed.get(key, {})
    ]
    equal = sum((a.num_accepted, a.num_proposed) == (b.num_accepted, b.num_proposed) for a, b in pairs)
    return ReplayCheck(rows=len(pairs), equal=equal)
