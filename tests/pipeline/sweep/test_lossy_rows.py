"""Measured rows of a lossy rule: all their rounds, no claim of exactness, and how far their text departs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.axes import Cell
from pipeline.decode import bench as measure
from pipeline.decode.dropmatch import DropMatch
from pipeline.store.files import read_rows
from pipeline.store.rows import PromptRow
from pipeline.sweep.evaluator import evaluated, failures_of
from tests.helpers.sweeps import LIMIT, SweepBench
from tests.helpers.tiny import tiny_tokenizer

CHANGES: dict[str, Any] = {
    "sweep.policies": ["streaming"],
    "sweep.rules": ["exact", "dropmatch"],
    "sweep.dropmatch": {"masks": 4, "dropout": 0.4},
    "sweep.measure": {"budgets": [16], "gammas": [5], "repeats": 2, "prompts_together": 2},
    "sweep.seeds": [3],
}
Found = tuple[list[PromptRow], list[tuple[measure.Chance, list[list[int]]]]]


@pytest.fixture(scope="module")
def found(bench: SweepBench) -> Found:
    """The rows of four prompts, and what was decoded: how, and its tokens."""
    runs: list[tuple[measure.Chance, list[list[int]]]] = []
    ours = measure.Bench.speculative

    def noted(self: measure.Bench, source: Any, gamma: int, chance: measure.Chance, eos: Any) -> Any:
        run = ours(self, source, gamma, chance, eos)
        runs.append((chance, run.tokens))
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.Bench, "speculative", noted)
        task = bench.measured(bench.folder / "lossy", changes=CHANGES, last=4)
    assert not failures_of(task).exists()
    return read_rows(task.output, PromptRow), runs


def texts(found: Found, bench: SweepBench) -> dict[str, list[int]]:
    """prompt_id → the tokens of the lossy cell."""
    tokens = [tokens for chance, tokens in found[1] if chance.dropmatch]
    ids = [prompt.prompt_id for prompt in bench.prompts]
    return dict(zip(ids, [*tokens[0], *tokens[-1]], strict=True))  # two batches of two prompts


def test_the_masks_are_those_of_config_and_seed(found: Found) -> None:
    chances = {chance.dropmatch for chance, _ in found[1]}
    assert chances == {None, DropMatch(4, 0.4, 3)}


def test_exact_cells_beside_them_stay_exact(found: Found) -> None:
    exact = [row for row in found[0] if not row.cell.lossy]
    assert len(exact) == 4 and all(row.timing and row.timing.exact is True for row in exact)
    assert all(row.departure is None for row in exact)


def test_lossy_rows_claim_no_exactness_and_leave_nothing_out(found: Found, bench: SweepBench) -> None:
    rows = [row for row in found[0] if row.cell.lossy]
    text, tokenizer = texts(found, bench), tiny_tokenizer()
    assert len(rows) == 4
    for row in rows:
        assert row.timing is not None and (row.timing.exact, row.timing.divergence_gap) == (None, None)
        assert row.num_left_out == 0 and row.counts.num_tokens == LIMIT - 1
        assert row.timing.text == tokenizer.decode(text[row.prompt_id])
        assert len(row.timing.decode_s) == 2 and row.timing.ar_num_tokens == LIMIT - 1
    own = {row.prompt_id: row.tokens for row in bench.continuations}
    assert any(text[prompt] != own[prompt] for prompt in text), "the masks change something here"


@torch.no_grad()
def test_departures_are_those_of_a_plain_forward(found: Found, bench: SweepBench) -> None:
    own = {row.prompt_id: row.tokens for row in bench.continuations}
    text = texts(found, bench)
    prompts = {prompt.prompt_id: prompt.tokens for prompt in bench.prompts}

    def scores(prompt: str, tokens: list[int]) -> tuple[float, int]:
        logits = bench.pair[0](input_ids=torch.tensor([prompts[prompt] + tokens])).logits[0]
        rows = logits[len(prompts[prompt]) : -1].log_softmax(-1)  # those that predict tokens 1 and on
        given = torch.tensor(tokens[1:])
        log_prob = float(rows.gather(1, given.unsqueeze(1)).sum())
        return log_prob, int((rows.argmax(-1) != given).sum())

    for row in (row for row in found[0] if row.cell.lossy):
        ours, theirs, departure = text[row.prompt_id], own[row.prompt_id], row.departure
        assert departure is not None
        log_prob, not_best = scores(row.prompt_id, ours)
        assert departure.log_prob == pytest.approx(log_prob, abs=1e-2)
        assert departure.num_not_best == not_best
        assert departure.ar_log_prob == pytest.approx(scores(row.prompt_id, theirs)[0], abs=1e-2)
        same = [a == b for a, b in zip(ours[1:], theirs[1:], strict=True)]
        assert (departure.num_compared, departure.num_same) == (len(same), sum(same))
        assert departure.first_difference == (same.index(False) + 1 if False in same else None)
        assert departure.num_not_best > 0 or ours == theirs


def test_progress_counts_their_acceptance_nowhere(found: Found) -> None:
    told = evaluated(found[0])
    proposed = sum(row.counts.num_proposed or 0 for row in found[0] if not row.cell.lossy)
    assert told.rows == 8 and told.accepted["drafter", "code"][1] == proposed


def test_rows_without_a_departure_are_read(found: Found) -> None:
    """Rows from before there was one have neither the field nor the rule."""
    row = next(row for row in found[0] if not row.cell.lossy)
    old = row.model_dump(mode="json", exclude={"departure": True, "cell": {"rule"}})
    assert PromptRow.model_validate(old) == row and isinstance(row.cell, Cell)
