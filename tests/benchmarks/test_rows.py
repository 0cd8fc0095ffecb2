"""The benchmarks: what they compare is the same work, and what they write says what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import scale
from benchmarks.baselines import huggingface
from benchmarks.decoding import check
from benchmarks.gpu import decoding as gpu
from benchmarks.grid import grid_rows
from benchmarks.memory import memory_row
from benchmarks.pairs import Ours, Pair
from benchmarks.paper_decoder import PaperDecoder
from benchmarks.rows import Row, interleaved, median, row, table, write
from benchmarks.synthetic import solve_alpha, synthetic_sampler
from benchmarks.training import make_engine, paper_step
from benchmarks.zero import SMALL, Held, check_losses, storage_bytes, zero_rows
from pipeline.axes import FULL
from pipeline.kv.views import view_of
from pipeline.train.losses import LOSSES, TargetLabels
from pipeline.train.windows import window_scores
from tests.helpers.models import random_tokens


def test_rows_say_what_was_measured_and_whether_it_suffices(tmp_path: Path) -> None:
    made = [
        row("fast", [2.0, 2.2, 2.1], 2.0),
        row("small", [0.2, 0.3, 0.2], 0.1, at_most=True, unit=""),
        row("GPU absent", [], 1.5, synthetic=True),
        row("reported", [1.0]),
    ]
    assert [one.met for one in made] == [True, False, None, None]
    assert made[0].value == 2.1 and made[0].low >= 2.0 and made[0].high <= 2.2
    write(made, tmp_path / "bench.json")
    lines = json.loads((tmp_path / "bench.json").read_text())
    assert [line["row"] for line in lines] == ["fast", "small", "GPU absent", "reported"]
    wanted = {"row", "value", "low", "high", "target", "met", "device", "synthetic", "versions", "commit"}
    assert all(wanted <= set(line) for line in lines)
    assert lines[2]["value"] is None and lines[2]["synthetic"] and lines[0]["versions"]["torch"]
    text = table(made)
    assert "no GPU" in text and "NO" in text and "(synthetic acceptance)" in text and "≤ 0.1" in text


def test_the_interval_covers_the_median() -> None:
    """About 95 of 100 samples of a known distribution."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high = median(rng.normal(5.0, 1.0, 25))
        covered += low <= 5.0 <= high
    assert 176 <= covered <= 199


def test_runs_take_turns_and_the_first_is_thrown_away() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, 2)
    assert order == ["a", "b"] * 3 and found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize(("rate", "gamma"), [(0.8, 4), (0.68, 50), (0.34, 10)])
def test_alpha_gives_the_stated_acceptance(rate: float, gamma: int) -> None:
    alpha = solve_alpha(rate, gamma)
    assert sum(alpha**i for i in range(1, gamma + 1)) / gamma == pytest.approx(rate)


def test_synthetic_rounds_accept_at_the_stated_rate(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    pair = Pair("toy", target, drafter, [random_tokens(1, 40)], 400)
    ours = Ours(pair, view_of("chunk_topk", 16), 4)
    rates = [ours.speculation(0, 4, synthetic_sampler(0.8, 4, seed=seed))[2] for seed in range(4)]
    assert sum(rates) / 4 == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("gamma", [1, 4])
def test_the_paper_s_decoder_gives_our_text_by_the_same_rounds(
    target: PreTrainedModel, drafter: PreTrainedModel, gamma: int
) -> None:
    """Behind a prefix whose partial last chunk both drop."""
    pair = Pair("toy", target, drafter, [random_tokens(1, 45, seed) for seed in range(3)], 40)
    ours, theirs = Ours(pair, view_of("chunk_topk_paper", 16), gamma), PaperDecoder(pair, 16)
    rates = []
    for number in range(3):
        text, _, rate = theirs.speculation(number, gamma)
        mine, _, own = ours.speculation(number, gamma)
        assert text == mine == ours.plain(number)[0] and rate == own
        rates.append(rate)
    assert min(rates) > 0 and max(rates) < 1, "some proposals stand and some do not"
    whole = Ours(pair, FULL, gamma)
    assert rates != [whole.speculation(number, gamma)[2] for number in range(3)], "the cut matters"


@pytest.mark.long
def test_nothing_is_timed_where_texts_differ(
    target: PreTrainedModel, make_model: Callable[..., PreTrainedModel]
) -> None:
    pair = Pair("toy", target, target, [random_tokens(1, 40)], 40)
    check(pair, huggingface(target), huggingface(target))
    with pytest.raises(AssertionError, match="toy: AR"):
        check(pair, huggingface(make_model(layers=3, hidden=48, seed=2)), None)


def test_the_paper_style_step_updates_as_ours_does(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    """One window: separate forwards with labels made in the step, against one forward of all views."""
    tokens, window, views, weights = random_tokens(1, 61), 12, [FULL, view_of("chunk_topk", 16)], [1.0, 0.5]
    theirs, ours = make_engine(drafter), make_engine(drafter)
    paper_step(theirs, target, tokens, window, views, weights, 1e-2)
    start = tokens.shape[1] - window - 1
    with torch.no_grad():
        labels = TargetLabels(target(input_ids=tokens).logits[0, start:-1].argmax(-1))
    scores = window_scores(ours.model, tokens, (start,), window, views, 2**40)
    losses = [LOSSES["cross_entropy"](one, labels).mean() for one in scores]
    ours.backward(losses[0] * weights[0] + losses[1] * weights[1])
    ours.step(1e-2)
    before = dict(drafter.named_parameters())
    for (name, a), (_, b) in zip(theirs.model.named_parameters(), ours.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        assert not torch.equal(a, before[name])


def test_the_largest_tensor_of_distill_loss_is_found() -> None:
    assert memory_row(positions=512, vocabulary=40_000).met


def test_the_grid_is_replayed_with_one_prefill_a_prompt() -> None:
    """The paper's budgets, drafters and γ at a sixteenth of its lengths; every sampled cell agrees."""
    contexts = "data.contexts=[{name: 4K, tokens: 320}, {name: 8K, tokens: 512}, {name: 16K, tokens: 1024}]"
    small = ("sweep.budgets=[16, 32, 64, 128]", "data.max_new_tokens=24", "data.prompts=2")
    seconds, ratio, prefills = grid_rows(6, [contexts, *small])
    assert seconds.row == "the paper's grid × 3 drafters × 2 prompts by replay" and seconds.met
    assert "936 cells, 1872 cells × prompts" in seconds.note
    assert "from 6 random" in ratio.note and "6 of them accept what replay says" in ratio.note
    assert ratio.value and ratio.low and ratio.high and 0 < ratio.low <= ratio.value <= ratio.high
    assert prefills.value == 1 and prefills.met and "18 prompts" in prefills.note


@pytest.mark.slow
def test_ranks_hold_what_their_stage_leaves_them() -> None:
    """Bytes by hand: 4 a parameter for weights, 4 for gradients, 8 for moments, 4 for a master copy."""
    model = SMALL.model_copy(update={"layers": 2, "hidden": 256, "intermediate": 1024})
    layer = 4 * 256 * 256 + 3 * 256 * 1024 + 2 * 256
    megabytes = (512 * 256 + 2 * layer + 256) / 1e6
    plain, whole, shared = zero_rows((2,), ("zero0", "zero3"), model)
    for one in (plain, whole):
        assert held_in(one) == pytest.approx([4 * megabytes, 4 * megabytes, 8 * megabytes], abs=0.51)
    assert held_in(shared) == pytest.approx([2 * megabytes, 2 * megabytes, 4 * megabytes], abs=0.51)
    assert "zero3, 2 ranks" in shared.row and shared.value and shared.value > 8 * megabytes / 1e3


def held_in(row: Row) -> list[int]:
    """MB of weights, gradients and optimizer state in a row's note."""
    found = re.search(r"of tensors \d+ \((\d+) weights, (\d+) gradients, (\d+) optimizer\)", row.note)
    assert found, row.note
    return [int(number) for number in found.groups()]


def test_a_rank_that_trains_something_else_is_noticed() -> None:
    held = [Held([3.0, 2.0], 0, 0, 0, 0), Held([3.0, 2.001], 0, 0, 0, 0)]
    check_losses("zero1", held[:1], [3.0001, 2.0])
    with pytest.raises(AssertionError, match="zero1, rank 1"):
        check_losses("zero1", held, [3.0, 2.0])


def test_a_storage_counts_once() -> None:
    whole = torch.zeros(10)
    assert storage_bytes([whole], [whole[:5], torch.zeros(3)], [whole[5:]]) == [40, 12, 0]


@pytest.mark.slow
def test_a_sweep_is_scanned_resumed_and_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 40th of its cells, in this process: what the rows claim of real work is asserted as they are made."""
    monkeypatch.setattr(scale, "apart", lambda function, *given: function(*given))
    contexts = "data.contexts=[{name: a, tokens: 96}, {name: b, tokens: 128}]"
    small = ("sweep.policies=[streaming]", "sweep.gammas=[1, 2, 4, 8]", "sweep.budgets=[16, full]")
    inline = ("run.executor=inline", "sweep.num_evaluators=1", "data.prompts=2")
    rows = {one.row: one for one in scale.scale_rows([contexts, *small, *inline], nodes=())}
    assert len(rows) == 7
    cells = 2 * 2 * 2 * 2 * 4 * 2  # sources, contexts, drafters, budgets, γ, thresholds
    assert f"{cells} cells × 2 prompts = {2 * cells} rows" in rows["driver memory: stage sweep"].note
    assert f"{cells // 4} runs, one a curve" in rows["tracking: time per curve"].note
    assert " of 4 items" in rows["orchestration per cell"].note
    assert all(one.value is not None and one.value > 0 for one in rows.values())


def test_throughput_counts_once_every_evaluator_is_up() -> None:
    """Two workers of which the second comes at 3 s: four results in the two seconds after."""
    results = [(1, 1.0), (1, 2.0), (2, 3.0), (1, 3.5), (2, 4.0), (1, 4.5), (2, 5.0)]
    assert scale.steady_rate(results) == pytest.approx(2.0)
    one, two, four = scale.throughput_rows({1: 9.0, 2: 18.0, 4: 27.0})
    assert (one.value, two.value, four.value) == (9.0, 2.0, 3.0)
    assert (one.met, two.met, four.met) == (None, True, False)


@pytest.mark.slow
def test_gpu_rows_at_toy_size_on_any_device() -> None:
    """All of the file's work but the device: every row that a machine without a GPU leaves empty is there."""
    toy = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64}
    points = tuple(replace(point, tokens=64) for point in gpu.PAPER_POINTS)
    setting = gpu.Setting(
        device="cpu", compile="none", dtype=torch.float32, target=toy, drafter=toy, points=points,
        gammas=(2, 4), budget=16, budgets=(16, 32), new_tokens=12, repeats=2, inner=2,
    )  # fmt: skip
    rows = list(gpu.rows(setting, 1e10, "toy"))
    names = {one.row.replace("B = 16", "B = 512") for one in rows}
    for missing in gpu.missing_rows():
        if "copy bandwidth" in missing.row and "at 16K" in missing.row:
            continue  # the kernels' own, in benchmarks/gpu/kernels.py
        stem = missing.row.removesuffix(", best γ")
        assert any(name.startswith(stem) for name in names), missing.row
        assert missing.value is None and missing.met is None and missing.target
    best = [one for one in rows if "best γ" in one.note]
    assert [one.target for one in best] == [6.55, 4.46, 2.10] and all(one.synthetic for one in best)
    wanted: set[str] = set()
    for place in points:
        wanted.add(f"GPU AR step, {place.name}")
        for gamma in {2, 4, place.gamma}:
            wanted.add(f"GPU verify, {place.name}, γ = {gamma}")
            wanted |= {f"GPU draft, {place.name}, B = {budget}, γ = {gamma}" for budget in (16, 32)}
    assert wanted == {one.row for one in rows if " of copy bandwidth" in one.note}
    gpu.check("cpu")
    assert all(one.value is not None and one.value > 0 and one.device == "toy" for one in rows)


def test_the_share_of_the_bandwidth_is_of_weights_and_kv() -> None:
    """By hand, in fp32: a tied head of 32,000 × 32, a layer, the norms; KV of 64 entries."""
    model = gpu.random_llama(hidden=32, layers=1, heads=2, intermediate=64)
    weights = 4 * (32_000 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32)
    assert gpu.weights_read(model) == weights
    kv = gpu.decode_model(model).geometry.num_bytes(1, 64)
    assert kv == 4 * 2 * 64 * 32
    told = gpu.latency("a step", [2e-3, 1e-3, 4e-3], weights + kv, 1e10)
    assert (told.value, told.low, told.high, told.unit) == (2.0, 1.0, 4.0, " ms")
    shares = [(weights + kv) / seconds / 1e10 for seconds in (2e-3, 4e-3, 1e-3)]
    assert told.note == "{:.2f} [{:.2f}, {:.2f}] of copy bandwidth".format(*shares)
