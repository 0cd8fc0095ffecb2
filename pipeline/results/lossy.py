"""What is said of cells whose rule of acceptance is lossy.

Their rows stand beside those of exact cells in no table, figure, ranking or comparison.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline.metrics import Departure
from pipeline.store.rows import CellRow

WARNING = "lossy: the text is not the target's own"


def departure_text(departure: Departure) -> str:
    """How far texts are from the target's own, and the target's likelihood of both."""
    return (
        f"{100 * departure.same:.1f} % of positions hold what autoregressive decoding has there, "
        f"{100 * departure.not_best:.1f} % of tokens are not the target's arg-max; the target's mean "
        f"log-likelihood a token is {departure.mean_log_prob:.3f}, and of its own text "
        f"{departure.ar_mean_log_prob:.3f}"
    )


def lossy_findings(cells: Sequence[CellRow]) -> list[str]:
    """One text for each lossy rule, over all its cells."""
    by_rule: dict[str, list[Departure]] = defaultdict(list)
    for row in cells:
        if row.cell.lossy and row.departure is not None:
            by_rule[row.cell.rule].append(row.departure)
    return [
        f"{len(departures)} measured cells accept by {rule}, which is {WARNING}. In them "
        f"{departure_text(Departure.pooled(departures))}. They are in a table of their own, and in no other "
        "sentence, figure or recommendation here."
        for rule, departures in by_rule.items()
    ]
