"""Which drafter, policy, budget and γ to deploy in one place, or not to speculate there.

Cells are ranked by measured speed where it covers enough documents, else by predicted speed, scaled by what
measuring found of predictions in the same place. A recommendation needs an interval above the speed of
autoregressive decoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pipeline.planner import Place, cell_of
from pipeline.rows import Cell, CellRow, PredictedRow, Row


class ModelSize(Row):
    """Bytes of a model's weights, and of the KV of one token."""

    name: str
    weight_bytes: int
    kv_bytes_per_token: int


class Choice(Cell):
    """A cell with what is expected of it: speedup over autoregressive decoding and its 95 % interval."""

    basis: Literal["measured", "predicted"]
    speedup: float
    speedup_low: float
    speedup_high: float
    num_documents: int
    acceptance: float | None
    drafter_kv_bytes: int


class Recommendation(Row):
    """The fastest cell of a place and the next one, or None and why not.

    `rechecked` is the speedup of the recommended cell on fresh repeats, `best_rechecked` that of the cell
    that had been measured as the fastest.
    """

    dataset: str
    context: str
    choice: Choice | None
    runner_up: Choice | None
    why: str
    rechecked: float | None = None
    best_rechecked: float | None = None


@dataclass(frozen=True)
class Needs:
    """What a deployment allows: memory for `concurrency` prompts of `context_tokens`, a least acceptance."""

    context_tokens: int
    memory_bytes: float | None = None
    concurrency: int = 1
    min_acceptance: float | None = None

    def bytes_of(self, choice: Choice, sizes: dict[str, ModelSize]) -> int:
        """Weights of both models, and per prompt the target's whole KV and the drafter's kept one."""
        target = sizes["target"]
        weights = target.weight_bytes + (sizes[choice.drafter].weight_bytes if choice.drafter in sizes else 0)
        per_prompt = target.kv_bytes_per_token * self.context_tokens + choice.drafter_kv_bytes
        return weights + self.concurrency * per_prompt

    def refuses(self, choice: Choice, sizes: dict[str, ModelSize]) -> str:
        """Why a choice is out, or ""."""
        if self.min_acceptance is not None and (choice.acceptance or 0.0) < self.min_acceptance:
            return "acceptance"
        if self.memory_bytes is not None and self.bytes_of(choice, sizes) > self.memory_bytes:
            return "memory"
        return ""


def choices(
    cells: Iterable[CellRow], predicted: Iterable[PredictedRow], least_documents: int
) -> dict[Place, list[Choice]]:
    """Every greedy cell of a place that has a speed, fastest first."""
    replayed: dict[Cell, CellRow] = {}
    measured: dict[Cell, CellRow] = {}
    for row in cells:
        if row.control is None and row.temperature == 0:
            (measured if row.mode == "measure" else replayed)[cell_of(row)] = row
    forecasts = {cell_of(row): row for row in predicted}
    found: dict[Place, list[Choice]] = defaultdict(list)
    for place, scale in scales(measured, forecasts).items():
        here = [
            cell for cell in dict.fromkeys([*forecasts, *measured]) if (cell.dataset, cell.context) == place
        ]
        for cell in here:
            run, forecast = measured.get(cell), forecasts.get(cell)
            known = replayed.get(cell) or run
            assert known is not None, "a cell is predicted from its replay"
            trusted = run is not None and (run.num_documents >= least_documents or forecast is None)
            told: CellRow | PredictedRow | None = run if trusted else forecast
            assert told is not None, "a cell is measured or predicted"
            factor = 1.0 if trusted else scale
            found[place].append(
                Choice(
                    **cell.model_dump(),
                    basis="measured" if trusted else "predicted",
                    speedup=factor * (told.speedup or 0.0),
                    speedup_low=factor * (told.speedup_low or 0.0),
                    speedup_high=factor * (told.speedup_high or 0.0),
                    num_documents=told.num_documents,
                    acceptance=known.acceptance,
                    drafter_kv_bytes=known.drafter_kv_bytes,
                )
            )
    return {place: sorted(here, key=lambda choice: -choice.speedup) for place, here in found.items()}


def scales(measured: dict[Cell, CellRow], forecasts: dict[Cell, PredictedRow]) -> dict[Place, float]:
    """Per place the median of measured ÷ predicted speedup; 1 where nothing tells."""
    ratios: dict[Place, list[float]] = {Place(c.dataset, c.context): [] for c in (*forecasts, *measured)}
    for cell, run in measured.items():
        if cell in forecasts and run.speedup is not None:
            ratios[Place(cell.dataset, cell.context)].append(run.speedup / forecasts[cell].speedup)
    return {place: median(values) if values else 1.0 for place, values in ratios.items()}


def recommend(
    place: Place,
    here: Sequence[Choice],
    least_documents: int,
    needs: Needs | None = None,
    sizes: dict[str, ModelSize] | None = None,
) -> Recommendation:
    """The fastest choice that the needs allow, if it is shown to be faster than autoregressive decoding."""

    def say(why: str, choice: Choice | None = None, runner_up: Choice | None = None) -> Recommendation:
        return Recommendation(
            dataset=place.dataset, context=place.context, choice=choice, runner_up=runner_up, why=why
        )

    if not here:
        return say("do not speculate here: no cell has a measured or predicted speed")
    out = [needs.refuses(choice, sizes or {}) if needs else "" for choice in here]
    left = [choice for choice, reason in zip(here, out, strict=True) if not reason]
    if not left:
        return say(f"do not speculate here: every cell is out for {' or '.join(sorted(set(out)))}")
    best, *others = left
    if best.num_documents < least_documents:
        return say(
            f"too few documents to rank ({best.num_documents} of at least {least_documents})", None, best
        )
    if best.speedup_low <= 1:
        return say(
            f"do not speculate here: the best cell is at {best.speedup:.2f}× "
            f"[{best.speedup_low:.2f}, {best.speedup_high:.2f}] of autoregressive speed",
            None,
            best,
        )
    return say(f"the fastest of {len(left)} cells", best, others[0] if others else None)
