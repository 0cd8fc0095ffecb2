"""`conf/paper.yaml` and the experiments in `conf/paper/`: the paper's facts, its grid, and what is timed."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import pytest

from pipeline.axes import Place
from pipeline.config.files import load_config
from pipeline.config.schema import Config
from pipeline.sweep.counts import count_sweep
from pipeline.sweep.grid import Drafter
from pipeline.sweep.picks import configured_picks
from tests.helpers.paths import ROOT

PAPER = ROOT / "conf" / "paper.yaml"
MULTI_VIEW = {"budgets": {256: 0.4, 512: 0.3, 1024: 0.2, 2048: 0.1}, "num_views": 1}
FACTS: dict[str, Any] = {
    "seed": 42,
    "target.path": "NousResearch/Yarn-Llama-2-7b-128k",
    "target.dtype": "float16",
    "target.trust_remote_code": False,
    "drafter.path": "JackFram/llama-68m",
    "drafter.dtype": "float32",
    "data.tokenizer.kind": "target",
    "data.sequence_tokens": 16384,
    "data.max_new_tokens": 256,
    "data.prompts": 10,
    "train.window_tokens": 256,
    "train.windows": 1,
    "train.min_prefix_tokens": 16384 - 256,  # the window is the end of the sequence
    "train.learning_rate": 1e-5,
    "train.weight_decay": 0.01,
    "train.warmup_steps": 150,
    "train.steps": 5000,
    "train.clip": 1.0,
    "train.dtype": "float32",
    "sweep.policies": ("chunk_topk",),
    "sweep.temperatures": (0.0,),
    "sweep.measure.prompts": 9,  # the paper's tenth warms up
}


# ── what it says ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("field", FACTS)
def test_facts(field: str) -> None:
    assert reduce(getattr, field.split("."), load_config(PAPER)) == FACTS[field]


def test_facts_of_data_variants_and_sweep() -> None:
    config = load_config(PAPER)
    assert [(s.kind, getattr(s, "path", None), s.use) for s in config.data.sources] == [
        ("pg19", "emozilla/pg19", ("train", "validation", "test")),
        ("longbench", "THUDM/LongBench", ("test",)),
        ("lwm", "deepmind/narrativeqa", ("test",)),
    ]
    _, qmsum, lwm = config.data.sources
    assert (qmsum.task, lwm.task, lwm.rows) == ("qmsum", "summary", None)  # type: ignore[union-attr]
    assert [(c.name, c.tokens) for c in config.data.contexts] == [("4K", 3800), ("8K", 8192), ("16K", 16384)]
    variants = {v.name: v for v in config.train.variants}
    expected: dict[str, dict[str, Any]] = {
        "full_only": {"sparse_weight": 0},
        "single_budget": {"sparse_weight": 0.5, "budgets": {1024: 1}, "num_views": 1},
        "multi_view": {"sparse_weight": 0.5, **MULTI_VIEW},
        "multi_view_lambda_1": {"sparse_weight": 1, **MULTI_VIEW},
    }
    for name, fields in expected.items():
        assert {field: getattr(variants[name], field) for field in fields} == fields
        assert variants[name].steps is None and variants[name].full_weight == 1
        assert {variants[name].full_loss, variants[name].sparse_loss} == {"cross_entropy"}
    assert {256, 512, 1024, 2048} <= set(config.sweep.budgets)
    assert config.sweep.gammas[0] == 5 and {30, 40, 60} <= set(config.sweep.gammas)


# ── its experiments, conf/paper/ ──────────────────────────────────────────────────────────────────

GRID = {"4K": tuple(range(5, 61, 5)), "8K": tuple(range(5, 31, 5)), "16K": tuple(range(5, 41, 5))}
AT_5 = dict.fromkeys(GRID, (5,))
ABLATIONS = ["full_only", "single_budget", "multi_view", "multi_view_lambda_1"]


class Experiment(NamedTuple):
    """What is swept, and of which variants and γ every cell is timed."""

    variants: list[str]
    budgets: tuple[int | str, ...]
    gammas: dict[str, tuple[int, ...]]
    timed: set[str]
    timed_gammas: dict[str, tuple[int, ...]]


ALL_BUDGETS = (256, 512, 1024, 2048, "full")
FIGURE = GRID | {"4K": (*GRID["4K"], 65)}
EXPERIMENTS = {
    "table-1": Experiment(["untrained", "full_only", "multi_view"], ALL_BUDGETS, GRID, {"multi_view"}, AT_5),
    "table-2": Experiment(
        ["untrained", "multi_view"], (2048, "full"), AT_5, {"untrained", "multi_view"}, AT_5
    ),
    "table-3": Experiment(ABLATIONS, ALL_BUDGETS, AT_5, {"multi_view"}, AT_5),
    "figure-3": Experiment(["multi_view"], (2048,), FIGURE, {"multi_view"}, FIGURE),
}


def timed_cells(config: Config) -> set[tuple[str, str, int | str, int]]:
    """(context, drafter, budget, γ) of the cells that the config names for measuring."""
    drafters = [Drafter(v.name, None, 0) for v in config.train.drafters]
    dataset = config.data.sources[0].name
    return {
        (cell.context, cell.drafter, cell.budget, cell.gamma)
        for context in config.data.contexts
        for cell in configured_picks(config.sweep, drafters, Place(dataset, context.name))
    }


def test_every_experiment_is_tested() -> None:
    assert {file.stem for file in (PAPER.parent / "paper").glob("*.yaml")} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_sweep_the_papers_grid(name: str) -> None:
    config = load_config(PAPER.parent / "paper" / f"{name}.yaml")
    variants, budgets, gammas, timed, timed_gammas = EXPERIMENTS[name]
    assert config.name == f"paper-{name}" and [v.name for v in config.train.variants] == variants
    assert (config.sweep.mode, config.sweep.budgets) == ("both", budgets)
    assert {c.name: config.sweep.gammas_of(c.name) for c in config.data.contexts} == gammas
    assert config.sweep.controls == ("other_prompt",)
    assert timed_cells(config) == {
        (context, drafter, budget, gamma)
        for context, here in timed_gammas.items()
        for drafter in timed
        for budget in budgets
        for gamma in here
    }


def test_table_1_times_few_cells_and_all_of_them_when_asked() -> None:
    """The override is the one that the file's comment names; what is not timed is predicted."""
    file, override = PAPER.parent / "paper" / "table-1.yaml", "sweep.measure.gammas=[]"
    assert override in file.read_text(encoding="utf-8")
    shipped, whole = load_config(file), load_config(file, [override])
    assert shipped.sweep.predicts
    places = {Place(s.name, c.name): 10 for s in shipped.data.sources for c in shipped.data.contexts}
    counts, all_counts = count_sweep(shipped, places), count_sweep(whole, places)
    assert counts.replayed == all_counts.replayed
    assert 3 * counts.measured < all_counts.measured
    assert timed_cells(whole) == {
        (context, "multi_view", budget, gamma)
        for context, here in GRID.items()
        for budget in ALL_BUDGETS
        for gamma in here
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_share_data_labels_and_drafters_with_the_paper_config(name: str) -> None:
    """Equal settings, equal fingerprints: what one of them has made, the others find."""
    config, paper = load_config(PAPER.parent / "paper" / f"{name}.yaml"), load_config(PAPER)
    for group in ("seed", "storage", "data", "target", "drafter", "labels"):
        assert getattr(config, group) == getattr(paper, group)
    assert config.train.model_copy(update={"variants": ()}) == paper.train.model_copy(update={"variants": ()})
    variants = {v.name: v for v in paper.train.variants}
    assert all(variant == variants[variant.name] for variant in config.train.variants)
