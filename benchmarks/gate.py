"""How often the gate errs, by resampling real rows: `multi_view` against `full_only` of the quickstart.

A trial draws documents with replacement and asks the gate for its verdict. The documents are first given a
known true difference, with all their spread and the ties between budgets kept:

- *swapped*: a coin for each drawn document decides whether candidate and baseline change places. No cell has
  a difference.
- *shifted*: each document's accepted tokens of the candidate change by the same share of its proposed ones,
  so that the pooled difference of all documents is the wanted one, cell by cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

from benchmarks.rows import Row
from pipeline.config.files import load_group
from pipeline.config.gate import GateConfig
from pipeline.gate.bounds import Verdict, bounds, outcomes, verdict
from pipeline.gate.evidence import read_evidence
from pipeline.gate.pairs import acceptance_pairs, both_sides, sums
from pipeline.hardware import cpu_name
from pipeline.intervals import Floats

TRIALS, PROMPTS = 400, 100
LADDER = (20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400)
LOSS = 0.05
FAR = 0.2  # a gain that leaves no doubt

World = Callable[[Floats, np.random.Generator], Floats]


def gate_rows(storage: str, trials: int = TRIALS) -> list[Row]:
    """All rows; runs the quickstart into `storage` first if it is not there."""
    from jobs.stages.pipeline import run_pipeline
    from pipeline.config.files import load_config

    results = run_pipeline(load_config(Path("conf/quickstart.yaml"), [f"storage={storage}"]))
    config = load_group(GateConfig, Path("conf/gate.yaml"))
    sides = [read_evidence(Path(results), drafter) for drafter in ("multi_view", "full_only")]
    pairs = acceptance_pairs(both_sides(*sides), config)
    return [*false_alarms(sums(pairs), config, trials), *losses(sums(pairs), config, trials)]


def false_alarms(sums_UKSR: Floats, config: GateConfig, trials: int) -> list[Row]:
    """No true difference: how often the candidate fails."""
    cells, margin = sums_UKSR.shape[1], config.margins.acceptance
    same = shifted(sums_UKSR, np.zeros(cells))
    worlds = {
        "sides swapped, nothing tolerated": (swapped, 0.0),
        "shifted to 0, nothing tolerated": (same, 0.0),
        f"shifted to 0, {100 * margin:g} point tolerated": (same, margin),
    }
    return [
        share_row(
            f"gate: fails without any true difference, {name}",
            [answer == "fail" for answer in verdicts(sums_UKSR, world, PROMPTS, least, config, trials)],
            0.05, at_most=True, note=f"{cells} cells, {PROMPTS} documents of one prompt",
        )
        for name, (world, least) in worlds.items()
    ]  # fmt: skip


def losses(sums_UKSR: Floats, config: GateConfig, trials: int) -> list[Row]:
    """Acceptance lost: how often it is found, and how often the candidate passes all the same."""
    cells, margin = sums_UKSR.shape[1], config.margins.acceptance
    everywhere = shifted(sums_UKSR, np.full(cells, -LOSS))
    lost = f"{100 * LOSS:g} points"
    rows = []
    for name, world in (
        ("every cell", everywhere),
        ("one cell", shifted(sums_UKSR, only(cells, 0, -LOSS, 0.0))),
    ):
        answers = verdicts(sums_UKSR, world, PROMPTS, margin, config, trials)
        # A loss in one cell among many has no target: its last row says how many prompts finding it takes.
        target = 0.95 if world is everywhere else None
        fails, passes = ([answer == outcome for answer in answers] for outcome in ("fail", "pass"))
        rows.append(share_row(f"gate: {lost} lost in {name}: fails", fails, target,
                              note=f"{PROMPTS} documents of one prompt"))  # fmt: skip
        rows.append(share_row(f"gate: {lost} lost in {name}: passes", passes,
                              config.error_rate, at_most=True))  # fmt: skip
        rows.append(
            prompts_row(f"gate: prompts that find {lost} lost in {name}", sums_UKSR, world, config, trials)
        )
    for cell, name in ((0, "smallest budget"), (cells - 1, "full cache")):
        world = shifted(sums_UKSR, only(cells, cell, -margin, FAR))
        answers = verdicts(sums_UKSR, world, PROMPTS, margin, config, trials)
        fails, passes = ([answer == outcome for answer in answers] for outcome in ("fail", "pass"))
        rows.append(
            share_row(
                f"gate: exactly the margin lost at the {name}, gains elsewhere: passes",
                passes, config.error_rate, at_most=True,
                note=f"{PROMPTS} documents; fails in {100 * np.mean(fails):.1f} %",
            )
        )  # fmt: skip
    return rows


def verdicts(
    sums_UKSR: Floats, world: World, documents: int, margin: float, config: GateConfig, trials: int
) -> list[Verdict]:
    """What the gate says in each trial."""
    rng = np.random.default_rng(documents)
    floor_K = np.full(sums_UKSR.shape[1], -margin)
    answers = []
    for _ in range(trials):
        drawn = world(sums_UKSR[rng.integers(len(sums_UKSR), size=documents)], rng)
        limits = bounds(
            [drawn], samples=config.bootstrap_samples, seed=config.seed, error_rate=config.error_rate
        )
        answers.append(verdict(outcomes(limits, floor_K)))
    return answers


def swapped(drawn_UKSR: Floats, rng: np.random.Generator) -> Floats:
    """By a coin for each document, candidate and baseline change places in all its cells."""
    coin_U111 = rng.random((len(drawn_UKSR), 1, 1, 1)) < 0.5
    return np.where(coin_U111, drawn_UKSR[:, :, ::-1], drawn_UKSR)


def shifted(sums_UKSR: Floats, wanted_K: Floats) -> World:
    """A world in which the pooled difference of all documents is `wanted_K`, cell by cell."""
    rates_KS = sums_UKSR[..., 0].sum(0) / sums_UKSR[..., 1].sum(0)
    change_K = wanted_K - (rates_KS[:, 0] - rates_KS[:, 1])

    def shift(drawn_UKSR: Floats, rng: np.random.Generator) -> Floats:
        moved = drawn_UKSR.copy()
        moved[:, :, 0, 0] += change_K * moved[:, :, 0, 1]
        return moved

    return shift


def only(cells: int, cell: int, there: float, elsewhere: float) -> Floats:
    wanted_K = np.full(cells, elsewhere)
    wanted_K[cell] = there
    return wanted_K


def prompts_row(name: str, sums_UKSR: Floats, world: World, config: GateConfig, trials: int) -> Row:
    """The first number of prompts at which the loss is found in 95 % of the trials."""
    shares = {}
    for documents in LADDER:
        answers = verdicts(sums_UKSR, world, documents, config.margins.acceptance, config, trials)
        shares[documents] = float(np.mean([answer == "fail" for answer in answers]))
        if shares[documents] >= 0.95:
            break
    tried = ", ".join(f"{documents}: {100 * share:.0f} %" for documents, share in shares.items())
    reached = float(documents) if shares[documents] >= 0.95 else None
    return Row(
        name, reached, reached, reached, None, None, cpu_name(), unit="", note=f"found in 95 %; {tried}"
    )


def share_row(
    name: str, hits: Sequence[bool], target: float | None, *, at_most: bool = False, note: str = ""
) -> Row:
    """A share of trials in percent, with Wilson's 95 % interval."""
    trials, share = len(hits), float(np.mean(hits))
    z = NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    met = None if target is None else bool(share <= target if at_most else share >= target)
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    goal = None if target is None else 100 * target
    notes = "; ".join(filter(None, [f"{trials} trials", note]))
    return Row(name, 100 * share, 100 * low, 100 * high, goal, met, cpu_name(), at_most=at_most, unit=" %",
               note=notes)  # fmt: skip
