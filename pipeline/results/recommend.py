"""Which drafter, policy, budget and γ to deploy in one place, or not to speculate there; for greedy decoding.

Only cells that were measured over enough documents are recommended; predictions say what to measure. The
fastest of many cells is partly lucky, so the fastest few are measured twice more, with more repeats. The
first time, the run-off, decides their order. The second time, the fresh repeats, decides whether a cell is
shown to be faster than autoregressive decoding: its interval has to lie above 1. The repeats use the same
prompts: they remove the luck of the clock, not that of the prompts. First measurements count only where no
allowed cell was measured again, and the advice says so.

Cells of a lossy rule are no choices unless they are asked for, and then alone: they are never measured again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from pipeline.axes import BASELINES, MODEL_FREE, Cell, Place, view_text
from pipeline.errors import BadData
from pipeline.intervals import Interval
from pipeline.metrics import Departure
from pipeline.results.lossy import WARNING
from pipeline.store.rows import CellRow, Mode, ModelSize, OfCell, Row, Speed
from pipeline.units import gigabytes


class Choice(OfCell):
    """A measured cell: decode speedup over autoregressive decoding with its 95 % interval.

    `run_off` is the speedup of the second measurement, which only the fastest cells get; `again` is that of
    the fresh repeats behind the run-off, which decide only whether the cell is shown to be faster than AR.
    `end_to_end` includes the prefills; it and `num_documents` are of the fresh repeats where there are any.
    `acceptance` is the replay's, over all prompts, or the measured one where replay cannot know it:
    `acceptance_mode` says which. `prompts_together` is how many prompts were decoded at once. The texts of
    `num_inexact` prompts differ from those of autoregressive decoding. `departure` is that of a lossy rule.
    """

    speedup: Interval
    prompts_together: int = 1
    run_off: float | None = None
    again: Interval | None
    end_to_end: float | None
    num_documents: int
    num_inexact: int = 0
    acceptance: float | None
    acceptance_mode: Mode | None = None
    drafter_kv_bytes: int
    departure: Departure | None = None

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts the fastest first. Cells of the run-off go by it alone: a fast first run put them there."""
        if self.run_off is None:
            return True, -self.speedup.mean
        return False, -self.run_off

    @property
    def expected(self) -> Interval:
        """Speedup, on the fresh repeats where there are any."""
        return self.again or self.speedup


class Recommendation(Row):
    """What to deploy in a place, and the next best; or None, why not, and the best cell that was refused.

    `best_again` is the best speedup on fresh repeats among all cells that were measured again.
    """

    dataset: str
    context: str
    choice: Choice | None
    runner_up: Choice | None
    why: str
    num_again: int
    best_again: float | None


Sizes = Mapping[str, ModelSize]


def settings_text(cell: Cell) -> str:
    """What to set for a cell: draft source, view and γ, and a threshold and a lossy rule if there are any."""
    stops = f", stopping under {cell.threshold:g}" if cell.threshold else ""
    rule = f", {cell.rule} ({WARNING})" if cell.lossy else ""
    return f"{cell.drafter}, {view_text(cell.view)}, γ = {cell.gamma}{stops}{rule}"


def models_of(cell: Cell) -> tuple[str, ...]:
    """The models that a cell holds in memory, by their names in `Sizes`; the drafting model comes last.

    `cascade` stands for what it adds: the weights of its small drafter, and the KV of drafter and middle.
    """
    alone = cell.drafter in BASELINES and cell.drafter != "cascade"
    return ("target",) if alone else ("target", cell.drafter)


def size_of(name: str, sizes: Sizes) -> ModelSize:
    """Raises BadData if the size of the model is not known."""
    if name not in sizes:
        raise BadData(
            f"these results do not say how large {name} is, which a limit of memory needs: run the sweep "
            "with sweep.mode: both and sweep.measure.predict: true"
        )
    return sizes[name]


@dataclass(frozen=True)
class Needs:
    """What a deployment allows: memory for `concurrency` texts, a least acceptance.

    A text is a prompt of `prompt_tokens` and up to `new_tokens` more. Memory is that of weights and KV,
    without activations and logits. All methods that take sizes raise BadData where a size that they need is
    not known.
    """

    prompt_tokens: int
    new_tokens: int
    memory_bytes: float | None = None
    concurrency: int = 1
    min_acceptance: float | None = None

    def target_bytes(self, sizes: Sizes) -> int:
        """The target's KV of one text."""
        return size_of("target", sizes).kv_bytes_per_token * (self.prompt_tokens + self.new_tokens)

    def drafter_bytes(self, choice: Choice, sizes: Sizes) -> int:
        """The drafter's KV of one text: what it keeps of the prefix, and all of the continuation.

        Self-speculation keeps a cache of its own beside the target's; a source without a model has none.
        """
        if choice.cell.drafter in MODEL_FREE:
            return 0
        per_token = size_of(models_of(choice.cell)[-1], sizes).kv_bytes_per_token
        kept = per_token * self.prompt_tokens if choice.cell.budget == "full" else choice.drafter_kv_bytes
        return kept + per_token * self.new_tokens

    def ar_bytes(self, sizes: Sizes) -> int:
        """What autoregressive decoding needs: the target's weights, and its KV of every text."""
        return size_of("target", sizes).weight_bytes + self.concurrency * self.target_bytes(sizes)

    def bytes_of(self, choice: Choice, sizes: Sizes) -> int:
        """What autoregressive decoding needs, the drafter's own weights, and its KV of every text."""
        weights = sum(size_of(name, sizes).weight_bytes for name in models_of(choice.cell)[1:])
        return self.ar_bytes(sizes) + weights + self.concurrency * self.drafter_bytes(choice, sizes)

    def refuses(self, choice: Choice, sizes: Sizes) -> str:
        """Why a choice is out, or ""."""
        least = self.min_acceptance
        if least is not None and (choice.acceptance is None or choice.acceptance < least):
            return "acceptance"
        if self.memory_bytes is not None and self.bytes_of(choice, sizes) > self.memory_bytes:
            return "memory"
        return ""

    def too_low(self, out: Sequence[Choice]) -> str:
        """The highest acceptance of the choices that are out for acceptance, in words; "" where none are."""
        known = [(choice.acceptance, choice) for choice in out if choice.acceptance is not None]
        if self.min_acceptance is None or not known:
            return ""
        acceptance, best = max(known, key=itemgetter(0))
        return (
            f"; those out for acceptance have {100 * acceptance:.1f} % at most "
            f"({settings_text(best.cell)}), the least is {100 * self.min_acceptance:g} %"
        )

    def shortage(self, out: Sequence[Choice], sizes: Sizes) -> str:
        """What the choices that are out for memory would need, in words; "" where none are."""
        if self.memory_bytes is None or not out:
            return ""
        alone = self.ar_bytes(sizes)
        return (
            f"; those out for memory need at least {gigabytes(min(self.bytes_of(c, sizes) for c in out))}, "
            f"the limit is {gigabytes(self.memory_bytes)}; autoregressive decoding alone needs "
            f"{gigabytes(alone)}{', which does not fit either' if alone > self.memory_bytes else ''}"
        )


def choices(
    cells: Iterable[CellRow], run_off: Iterable[CellRow], again: Iterable[CellRow], lossy: bool = False
) -> dict[Place, list[Choice]]:
    """Every measured greedy cell of each place, exact or `lossy`, in the order of `Choice.order`."""
    replayed: dict[Cell, CellRow] = {}
    measured: dict[Cell, tuple[CellRow, Speed]] = {}
    for row in cells:
        if row.cell.control is None and row.cell.temperature == 0 and row.cell.lossy == lossy:
            if row.speed is not None:
                measured[row.cell] = row, row.speed
            else:
                replayed[row.cell] = row
    raced, fresh = ({row.cell: row for row in rows if row.speed} for rows in (run_off, again))
    choices_by_place: dict[Place, list[Choice]] = defaultdict(list)
    for cell, (run, speed) in measured.items():
        race, second, replay = raced.get(cell), fresh.get(cell), replayed.get(cell)
        # For a cell that stops early, replay does not know what was proposed, nor therefore the acceptance.
        accepted = replay if replay and replay.acceptance is not None else run
        latest = (second and second.speed) or speed
        choices_by_place[cell.place].append(
            Choice(
                cell=cell,
                speedup=speed.speedup,
                prompts_together=run.prompts_together,
                # Not compared where prompts failed in it: those that are left may be the easy ones.
                run_off=race.speed.speedup.mean
                if race and race.speed and race.num_prompts == run.num_prompts
                else None,
                again=second.speed.speedup if second and second.speed else None,
                end_to_end=latest.end_to_end.mean if latest.end_to_end else None,
                num_documents=latest.num_clocked,
                num_inexact=inexact(run, race, second),
                acceptance=accepted.acceptance.mean if accepted.acceptance else None,
                acceptance_mode=accepted.mode,
                drafter_kv_bytes=run.drafter_kv_bytes,
                departure=run.departure,
            )
        )
    return {place: sorted(here, key=lambda choice: choice.order) for place, here in choices_by_place.items()}


def inexact(*runs: CellRow | None) -> int:
    """The most prompts of one run of a greedy cell that differ from autoregressive decoding."""
    counts = [(run.num_prompts, run.exact_prompts) for run in runs if run is not None]
    return max((prompts - exact for prompts, exact in counts if exact is not None), default=0)


def recommend(
    place: Place,
    here: Sequence[Choice],
    least_documents: int,
    needs: Needs | None = None,
    sizes: Sizes | None = None,
) -> Recommendation:
    """The first choice that the needs allow and that is shown to be faster than autoregressive decoding.

    Args:
        here: the choices of one place, in the order of `Choice.order`.

    Raises:
        BadData: if the needs limit memory and a size that this takes is not known.
    """
    fresh = [choice.again.mean for choice in here if choice.again is not None]

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

    def best_of(candidates: Iterable[Choice]) -> Choice | None:
        return max(candidates, key=lambda choice: choice.expected.mean, default=None)

    if not here:
        return say("do not speculate here: no cell was measured")
    sizes = sizes or {}
    out = [needs.refuses(choice, sizes) if needs else "" for choice in here]

    def out_for(why: str) -> list[Choice]:
        return [choice for choice, reason in zip(here, out, strict=True) if reason == why]

    left = out_for("")
    if needs and not left:
        reasons = " or ".join(sorted(set(out)))
        return say(
            f"do not speculate here: every measured cell is out for {reasons}"
            f"{needs.too_low(out_for('acceptance'))}{needs.shortage(out_for('memory'), sizes)}"
        )
    allowed = " that the needs allow" if len(left) < len(here) else ""
    enough = [choice for choice in left if choice.num_documents >= least_documents]
    if not enough:
        most = max(choice.num_documents for choice in left)
        speeds = sorted(choice.expected.mean for choice in left)
        return say(
            f"too few documents to rank ({most} of at least {least_documents}): {len(left)} cells were "
            f"measured, at {speeds[0]:.2f}× to {speeds[-1]:.2f}× of autoregressive decode speed",
            None,
            best_of(left),
        )
    # Where the fastest were measured again, only fresh repeats show anything: the first measurements of the
    # other cells may be as lucky as theirs were.
    raced = [choice for choice in left if choice.run_off is not None or choice.again is not None]
    judged = [choice for choice in enough if choice.again is not None] if raced else enough
    if not judged:
        return say(f"no fresh repeats of the fastest cells{allowed} (they failed): run the stage sweep again")
    # In the given order: picking the best of the fresh repeats would pick for luck again.
    shown = [choice for choice in judged if choice.expected.low > 1]
    if not shown:
        best = max(judged, key=lambda choice: choice.expected.mean)
        at = best.expected
        return say(
            f"do not speculate here: the best measured cell{allowed} is at {at.mean:.2f}× [{at.low:.2f}, "
            f"{at.high:.2f}] of autoregressive decode speed",
            None,
            best,
        )
    chosen = shown[0]
    in_it = f", by a run-off between {len(raced)}" if chosen.run_off is not None and len(raced) > 1 else ""
    why = f"the fastest of {len(left)} measured cells{allowed}{in_it}"
    if before := left.index(chosen):
        why += f", leaving out {before} not shown to be faster than autoregressive decoding"
    if chosen.again is None and len(left) > 1:
        why += f", by its first measurement alone, rather high as it was picked from {len(left)}"
    others = [choice for choice in judged if choice is not chosen]
    others = others or [choice for choice in enough if choice is not chosen and choice not in raced]
    runner_up = shown[1] if len(shown) > 1 else best_of(others)
    return say(why, chosen, runner_up)
