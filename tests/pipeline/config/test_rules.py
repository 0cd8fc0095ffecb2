"""Rules of acceptance in a config: what a lossy one needs, and that configs without one stay as they were."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.axes import Place
from pipeline.sweep.grid import cells_at, draft_sources
from pipeline.sweep.picks import configured_picks
from tests.helpers.tiny import tiny_config

LOSSY: dict[str, Any] = {"sweep.mode": "measure", "sweep.rules": ["exact", "dropmatch"]}


def test_defaults_are_as_if_the_fields_had_not_been_added() -> None:
    config = tiny_config()
    assert not {"rules", "dropmatch"} & config.model_dump(mode="json")["sweep"].keys()
    assert config.sweep.rules == ("exact",)
    assert (config.sweep.dropmatch.masks, config.sweep.dropmatch.dropout) == (5, 0.3)
    dumped = tiny_config(LOSSY | {"sweep.dropmatch": {"masks": 3}}).model_dump(mode="json")["sweep"]
    assert dumped["rules"] == ["exact", "dropmatch"] and dumped["dropmatch"] == {"masks": 3, "dropout": 0.3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sweep.mode": "replay"},
            "dropmatch has no replay, since its text is not the target's own: set mode",
        ),
        ({"sweep.temperatures": [0.0, 0.7]}, "dropmatch is for greedy decoding, and temperatures has 0.7"),
        ({"sweep.rules": ["dropmatch"]}, "rules lacks exact"),
        ({"sweep.rules": ["exact", "exact"]}, "rules lists exact twice"),
        ({"sweep.rules": ["exact"], "sweep.dropmatch": {"masks": 3}}, "add it to rules"),
        ({"sweep.dropmatch": {"masks": 0}}, "masks"),
        ({"sweep.dropmatch": {"dropout": 1.0}}, "dropout"),
    ],
)
def test_what_a_lossy_rule_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(LOSSY | changes)


def test_every_named_cell_is_measured_by_each_rule_and_none_is_replayed_by_a_lossy_one() -> None:
    config, place = tiny_config(LOSSY | {"sweep.measure": {"budgets": [16]}}), Place("code", "64")
    exact, lossy = (
        [
            pick
            for pick in configured_picks(config.sweep, draft_sources(config), place)
            if pick.lossy is wanted
        ]
        for wanted in (False, True)
    )
    assert len(exact) == 4, "two drafters at two γ"
    assert lossy == [pick.vary(rule="dropmatch") for pick in exact]
    replayed = [cell for source in draft_sources(config) for cell in cells_at(config.sweep, source, place)]
    assert set(exact) <= set(replayed) and not any(cell.lossy for cell in replayed)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ({"length": 17}, r"variants.v.path.length \(17\) is more than train.window_tokens \(16\)"),
        ({"paths": 1}, "path.paths\n.* greater than or equal to 2"),
        ({"length": 1}, "path.length\n.* greater than or equal to 2"),
        ({"every": 0}, "path.every\n.* greater than or equal to 1"),
        ({"temperature": 0}, "path.temperature\n.* greater than 0"),
        ({"steps": 3}, "path.steps\n.* not permitted"),
    ],
)
def test_what_a_path_cannot_be(path: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config({"train.variants": [{"name": "v", "sparse_weight": 0, "path": path}]})
    whole = tiny_config({"train.variants": [{"name": "v", "sparse_weight": 0, "path": {"length": 16}}]})
    assert whole.train.variants[0].path is not None
