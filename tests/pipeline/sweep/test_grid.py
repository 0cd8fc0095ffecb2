"""The cells of a sweep, and those of rows that were written before rows had one."""

from __future__ import annotations

from itertools import product

from pipeline.axes import Place
from pipeline.decode.sampling import Chance
from pipeline.models.load import ModelRef
from pipeline.store.rows import PickedCell
from pipeline.sweep.grid import Drafter, cells_behind, views_of
from pipeline.sweep.make_rows import at_chance
from tests.helpers.tiny import tiny_config

# Policy, budget and control of all rows that format 2 had of this sweep.
SPARSE = [("chunk_topk", 0), ("chunk_topk", 16), ("chunk_topk", "full")]
SPARSE += [("streaming", 0), ("streaming", 16), ("streaming", "full")]
OLD_VIEWS = {
    "multi_view~2": [
        *((policy, budget, None) for policy, budget in SPARSE),
        *((policy, budget, "other_prompt") for policy, budget in SPARSE if budget != 0),
        ("chunk_topk", 0, "no_prefix"),
        ("streaming", 0, "no_prefix"),
    ],
    "self_speculation": [("streaming", 16, None), ("snapkv", 16, None)],
    "prompt_lookup": [("none", 0, None)],
}


def test_the_cell_of_an_old_row_is_the_one_that_is_made_today() -> None:
    """Else rows of a sweep that was begun before would stand beside those that end it."""
    sweep = tiny_config({
        "decode.draft_length": "adaptive", "sweep.mode": "both", "sweep.gammas": [2, 4],
        "sweep.policies": ["chunk_topk", "streaming"], "sweep.budgets": [0, 16, "full"],
        "sweep.thresholds": [0.0, 0.5], "sweep.controls": ["other_prompt", "no_prefix"],
        "sweep.seeds": [3, 5],
    }).sweep  # fmt: skip
    drafters = [
        Drafter("multi_view~2", ModelRef("somewhere"), 128),
        Drafter("self_speculation", ModelRef("elsewhere"), 128, "self_speculation"),
        Drafter("prompt_lookup", None, 128, "prompt_lookup"),
    ]
    for drafter, chance in product(drafters, (Chance(0.0, 3), Chance(0.7, 5))):
        thresholds = (0.0, 0.5) if drafter.name == "multi_view~2" else (0.0,)
        old = [
            {
                "drafter": drafter.name, "dataset": "code", "context": "64", "policy": policy,
                "budget": budget, "control": control, "gamma": gamma, "threshold": threshold,
                "temperature": chance.temperature, "seed": chance.seed,
            }
            for policy, budget, control in OLD_VIEWS[drafter.name]
            for gamma, threshold in product((2, 4), thresholds)
        ]  # fmt: skip
        found = [PickedCell.model_validate(row).cell for row in old]
        made = [
            at_chance(cell, chance)
            for view in views_of(sweep, drafter)
            for cell in cells_behind(sweep, drafter, Place("code", "64"), view)
        ]
        assert found == made and set(found) == set(made) and len(set(made)) == len(made)
        assert {cell.kind for cell in found} == {cell.kind for cell in made} == {drafter.kind}
