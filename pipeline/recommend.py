"""Which drafter, policy, budget and γ to deploy in one place, or not to speculate there.

Only cells that were measured over enough documents are recommended; predictions say what to measure. The
fastest of many is fast by luck too, so the fastest few are measured once more, and what counts is the speed
of these fresh repeats: its interval has to lie above the speed of autoregressive decoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.planner import Place, cell_of
from pipeline.rows import Cell, CellRow, Row


class ModelSize(Row):
    """Bytes of a model's weights, and of the KV of one token."""

    name: str
    weight_bytes: int
    kv_bytes_per_token: int


class Choice(Cell):
    """A measured cell: decode speedup over autoregressive decoding with its 95 % interval.

    `again` is the speedup on fresh repeats, taken after the cell had been found to be among the fastest;
    `end_to_end` has the prefills in it.
    """

    speedup: float
    speedup_low: float
    speedup_high: float
    again: float | None
    again_low: float | None
    again_high: float | None
    end_to_end: float | None
    num_documents: int
    acceptance: float | None
    drafter_kv_bytes: int

    @property
    def expected(self) -> tuple[float, float, float]:
        """Speedup and interval, of the fresh repeats where there are any."""
        if self.again is not None and self.again_low is not None and self.again_high is not None:
            return self.again, self.again_low, self.again_high
        return self.speedup, self.speedup_low, self.speedup_high


class Recommendation(Row):
    """The fastest cell of a place and the next one, or None and why not.

    `best_again` is the best speedup on fresh repeats among all cells that were measured again.
    """

    dataset: str
    context: str
    choice: Choice | None
    runner_up: Choice | None
    why: str
    num_again: int
    best_again: float | None


@dataclass(frozen=True)
class Needs:
    """What a deployment allows: memory for `concurrency` texts, a least acceptance.

    `tokens` are those of a whole text, continuation included.
    """

    tokens: int
    memory_bytes: float | None = None
    concurrency: int = 1
    min_acceptance: float | None = None

    def drafter_bytes(self, choice: Choice, sizes: dict[str, ModelSize]) -> int:
        """The drafter's KV of one text: what it keeps of a prefix, and of a full cache every token."""
        if choice.budget == "full" and choice.drafter in sizes:
            return sizes[choice.drafter].kv_bytes_per_token * self.tokens
        return choice.drafter_kv_bytes

    def bytes_of(self, choice: Choice, sizes: dict[str, ModelSize]) -> int:
        """Weights of both models, and of each text the target's whole KV and the drafter's kept one."""
        target = sizes["target"]
        weights = target.weight_bytes + (sizes[choice.drafter].weight_bytes if choice.drafter in sizes else 0)
        per_text = target.kv_bytes_per_token * self.tokens + self.drafter_bytes(choice, sizes)
        return weights + self.concurrency * per_text

    def refuses(self, choice: Choice, sizes: dict[str, ModelSize]) -> str:
        """Why a choice is out, or ""."""
        if self.min_acceptance is not None and (choice.acceptance or 0.0) < self.min_acceptance:
            return "acceptance"
        if self.memory_bytes is not None and self.bytes_of(choice, sizes) > self.memory_bytes:
            return "memory"
        return ""


def choices(cells: Iterable[CellRow], again: Iterable[CellRow]) -> dict[Place, list[Choice]]:
    """Every measured greedy cell of a place, by its first measurement, fastest first."""
    replayed: dict[Cell, CellRow] = {}
    measured: dict[Cell, CellRow] = {}
    for row in cells:
        if row.control is None and row.temperature == 0:
            (measured if row.mode == "measure" else replayed)[cell_of(row)] = row
    fresh = {cell_of(row): row for row in again if row.mode == "measure"}
    found: dict[Place, list[Choice]] = defaultdict(list)
    for cell, run in measured.items():
        second = fresh.get(cell)
        found[Place(cell.dataset, cell.context)].append(
            Choice(
                **cell.model_dump(),
                speedup=run.speedup or 0.0,
                speedup_low=run.speedup_low or 0.0,
                speedup_high=run.speedup_high or 0.0,
                again=second.speedup if second else None,
                again_low=second.speedup_low if second else None,
                again_high=second.speedup_high if second else None,
                end_to_end=run.end_to_end_speedup,
                num_documents=run.num_clocked or run.num_documents,
                acceptance=replayed.get(cell, run).acceptance,
                drafter_kv_bytes=run.drafter_kv_bytes,
            )
        )
    return {place: sorted(here, key=lambda choice: -choice.speedup) for place, here in found.items()}


def recommend(
    place: Place,
    here: Sequence[Choice],
    least_documents: int,
    needs: Needs | None = None,
    sizes: dict[str, ModelSize] | None = None,
) -> Recommendation:
    """The fastest choice that the needs allow, if it is shown to be faster than autoregressive decoding.

    Args:
        here: the choices of one place, fastest first.
    """
    fresh = [choice.again for choice in here if choice.again is not None]

    def say(why: str, choice: Choice | None = None, runner_up: Choice | None = None) -> Recommendation:
        return Recommendation(
            dataset=place.dataset,
            context=place.context,
            choice=choice,
            runner_up=runner_up,
            why=why,
            num_again=len(fresh),
            best_again=max(fresh, default=None),
        )

    if not here:
        return say("do not speculate here: no cell was measured")
    out = [needs.refuses(choice, sizes or {}) if needs else "" for choice in here]
    left = [choice for choice, reason in zip(here, out, strict=True) if not reason]
    if not left:
        return say(f"do not speculate here: every measured cell is out for {' or '.join(sorted(set(out)))}")
    best, *others = left
    if best.num_documents < least_documents:
        few = f"too few documents to rank ({best.num_documents} of at least {least_documents})"
        return say(few, None, best)
    mean, low, high = best.expected
    if low <= 1:
        return say(
            f"do not speculate here: the best measured cell is at {mean:.2f}× [{low:.2f}, {high:.2f}] of "
            "autoregressive decode speed",
            None,
            best,
        )
    return say(f"the fastest of {len(left)} measured cells", best, others[0] if others else None)
