"""Speed and its units by hand."""

import pytest

from pipeline.results import pool, speed
from tests.helpers.report import AXES, measured, row
from tests.helpers.rows import varied

SEEDED = {"samples": 500, "seed": 0}


def speedup_of(rows) -> tuple[float, float, float]:
    (cell,) = pool.cell_rows(rows, AXES, **SEEDED)
    speedup = cell.speed.speedup
    return speedup.low, speedup.mean, speedup.high


def test_units_are_documents_and_what_batches_link():
    def rows(*batches):
        """(batch, document) a row; a batch of its own is a prompt's."""
        return [
            measured(prompt=i, document_id=document, together_with=batch)
            for i, (batch, document) in enumerate(batches)
        ]

    alone = rows((None, "a"), (None, "a"), (None, "b"))
    assert speed.clock_units(alone) == {"a": "a", "b": "b"}
    # x links a and b, y links c and d, and z, which comes last, b and c.
    linked = rows(("x", "a"), ("x", "b"), ("y", "c"), ("y", "d"), ("e", "e"), ("z", "b"), ("z", "c"))
    assert speed.clock_units(linked) == {"a": "a", "b": "a", "c": "a", "d": "a", "e": "e"}


def test_speedup_interval_resamples_documents():
    """Equally long prompts at 4 and at 2 times AR's speed: 8 s of AR in 2 s, and 8 s in 4 s."""
    fast = {"decode_s": [2.0], "ar_decode_s": [8.0]}
    slow = {"decode_s": [4.0], "ar_decode_s": [8.0]}
    one = [measured(prompt=0, **fast), measured(prompt=1, **slow)]
    assert speedup_of(one) == pytest.approx((16 / 6, 16 / 6, 16 / 6))
    two = [measured(prompt=0, **fast), measured(prompt=2, **slow)]
    assert speedup_of(two) == pytest.approx((2.0, 16 / 6, 4.0))
    together = [varied(r, together_with="p0", prompts_together=2) for r in two]
    assert speedup_of(together) == pytest.approx((16 / 6, 16 / 6, 16 / 6))


def test_ar_speed_pools_all_runs_of_a_place():
    rows = [
        measured(prompt=0, gamma=2),
        measured(prompt=0, gamma=4),
        measured(prompt=1, ar_num_tokens=60, ar_decode_s=[7.0, 8.0]),
        row(prompt=2),
    ]
    (found,) = speed.ar_speeds(rows, AXES, **SEEDED)
    assert found.speed.mean == pytest.approx((4 * 12 + 2 * 60) / (4 * 3.0 + 15.0))
    assert (found.dataset, found.context, found.num_prompts) == ("code", "64", 2)
    # Both prompts are of one document, which is in every resample.
    assert (found.speed.low, found.speed.high, found.num_documents) == (
        pytest.approx(found.speed.mean),
        pytest.approx(found.speed.mean),
        1,
    )


def test_ar_speed_interval_resamples_documents():
    rows = [measured(prompt=p, ar_decode_s=[3.0 if p < 2 else 6.0]) for p in range(4)]
    (found,) = speed.ar_speeds(rows, AXES, **SEEDED)
    assert (found.speed.low, found.speed.high) == pytest.approx((12 / 6, 12 / 3))
    assert (found.num_prompts, found.num_documents) == (4, 2)
