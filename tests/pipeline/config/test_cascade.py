"""The fields of a cascade in a config, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.axes import FULL, View
from pipeline.config.files import load_config
from pipeline.errors import ConfigError
from pipeline.sweep.grid import draft_sources, views_of
from tests.helpers.paths import ROOT
from tests.helpers.tiny import tiny_config

INNER: dict[str, Any] = {"drafter": "multi_view", "budget": 16, "gamma": 2}
CASCADE: dict[str, Any] = {"sweep.baselines": ["self_speculation", "cascade"], "sweep.cascade": INNER}


def test_the_default_is_as_if_the_field_had_not_been_added() -> None:
    assert "cascade" not in tiny_config().model_dump(mode="json")["sweep"]


def test_a_cascade_has_the_views_of_self_speculation_and_its_drafter_one_of_its_own() -> None:
    config = tiny_config(CASCADE)
    *_, alone, cascade = draft_sources(config)
    assert (cascade.name, cascade.kind, cascade.role) == ("cascade", "cascade", "target")
    assert views_of(config.sweep, cascade) == views_of(config.sweep, alone) != []
    assert config.sweep.cascade and config.sweep.cascade.view == View("streaming", 16)
    whole = tiny_config(CASCADE | {"sweep.cascade": INNER | {"budget": "full"}})
    assert whole.sweep.cascade and whole.sweep.cascade.view == FULL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sweep.baselines": ["cascade"]}, "cascade among sweep.baselines goes with sweep.cascade"),
        ({"sweep.cascade": INNER}, "set both or neither"),
        (
            CASCADE | {"sweep.cascade": INNER | {"drafter": "other"}},
            r"sweep.cascade.drafter: 'other' is not among the drafters \['full_only', 'multi_view'\]",
        ),
        (
            CASCADE | {"train.variants": [{"name": "multi_view", "budgets": {16: 1}, "seeds": [1, 2]}]},
            r"'multi_view' is not among the drafters \['multi_view~1', 'multi_view~2'\]",
        ),
        (CASCADE | {"sweep.cascade": INNER | {"budget": 17}}, "divisible by 8, not 17"),
        (CASCADE | {"sweep.cascade": INNER | {"gamma": 0}}, "greater than or equal to 1"),
        (
            CASCADE | {"drafter": {"kind": "head", "feature_layers": [1, 2]}, "target.layers": 3},
            "sweep.cascade: a head reads what the target",
        ),
        ({"train.variants": [{"name": "cascade", "budgets": {16: 1}}]}, "choose another name"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(changes)


def test_the_papers_table_2_has_a_cascade() -> None:
    file = ROOT / "conf" / "paper" / "table-2.yaml"
    config = load_config(file)
    assert "cascade" in config.sweep.baselines
    assert config.sweep.cascade and config.sweep.cascade.drafter == "untrained"
    with pytest.raises(ConfigError, match="set both or neither"):
        load_config(file, ["sweep.cascade=null"])
