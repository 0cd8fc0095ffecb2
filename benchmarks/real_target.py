"""A real target on a CPU: SmolLM2-135M of `make demo`, and drafters of its own layers.

What a step costs decides whether speculation pays, so these rows are costs: autoregressive decoding against
Hugging Face and against the memory's speed, verification and draft steps against an autoregressive step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.baselines import huggingface
from benchmarks.decoding import against_huggingface, over_prompts
from benchmarks.gpu.decoding import random_runner, weights_read
from benchmarks.pairs import Ours, Pair, mean
from benchmarks.paper_decoder import PaperDecoder
from benchmarks.real_head import head_rows
from benchmarks.rows import Row, interleaved, ratios, row, seconds_of
from pipeline.config.train import Labels
from pipeline.data.sources.text import expand
from pipeline.decode.model import DecodeModel, decode_model
from pipeline.decode.sampling import Rule
from pipeline.kv.slot_cache import slots_for
from pipeline.kv.views import view_of
from pipeline.models.draft_vocabulary import restrict
from pipeline.models.load import ModelRef, load_model
from pipeline.train.target.labelling import label_sequences

PREFIX, BUDGET, ROOM, GAMMA = 900, 256, 32, 4
NAME = "SmolLM2-135M"
LAYERS = {"two layers": (0, 1), "four layers": (0, 1, 2, 3)}
VERIFIED = (3, 5, 9)
BUFFER = 2**27  # numbers of 4 bytes that bandwidth is measured on


def real_rows(folder: Path, repeats: int) -> list[Row]:
    """All rows; one is printed as soon as it is measured."""
    rows: list[Row] = []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ref = ModelRef(str(folder), reach=2048)
    target = load_model(ref, len(tokenizer))
    prompts = texts(tokenizer, 2, PREFIX)
    pair = Pair(NAME, target, target, prompts, 24)
    for measure in (
        lambda: step_rows(target, ref, len(tokenizer), repeats),
        lambda: [teaching(target, texts(tokenizer, 4, 512), repeats)],
        lambda: against_huggingface(pair, huggingface(target), (1.0, 1.0), max(3, repeats // 3)),
        lambda: list(head_rows(target, prompts[0], NAME, repeats)),
        lambda: [against_paper(replace(pair, drafter=layers_of(ref, (0, 1), len(tokenizer))), repeats)],
    ):
        made = measure()
        rows += made
        for result in made:
            print(f"  {result.row}: {result.value:.3g} [{result.low:.3g}, {result.high:.3g}]", flush=True)
    return rows


def texts(tokenizer: object, count: int, tokens: int) -> list[Tensor]:
    """Beginnings of Python's own sources, [1, S] each."""
    found: list[Tensor] = []
    for file in sorted(expand("stdlib", Path()), key=lambda file: -file.stat().st_size):
        ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"][:tokens]  # type: ignore[operator]
        found.append(torch.tensor([ids]))
        if len(found) == count:
            return found
    raise AssertionError("the standard library has more files than that")


def layers_of(ref: ModelRef, layers: tuple[int, ...], num_tokens: int) -> PreTrainedModel:
    """A drafter of these layers of the target, untrained."""
    return load_model(replace(ref, layers=layers), num_tokens)


@torch.no_grad()
def step_rows(target: PreTrainedModel, ref: ModelRef, num_tokens: int, repeats: int) -> list[Row]:
    """One step of each kind behind a prefix, all in turn, with a read of a large buffer among them."""
    buffer = torch.ones(BUFFER)
    fast = decode_model(target)
    runs = {"AR": step(fast, PREFIX, 1), "read": lambda: seconds_of(buffer.sum)}
    for count in VERIFIED:
        runs[f"verify {count}"] = step(fast, PREFIX, count)
    for name, layers in LAYERS.items():
        whole = layers_of(ref, layers, num_tokens)
        runs[f"draft {name}, whole head"] = step(decode_model(whole), BUDGET, 1)
        few = restrict(layers_of(ref, layers, num_tokens), torch.arange(8192))
        runs[f"draft {name}, 8K tokens"] = step(decode_model(few), BUDGET, 1)
    seconds = interleaved(runs, 3 * repeats)
    read = weights_read(target) + fast.geometry.num_bytes(1, PREFIX)
    shares = [read / ar / (buffer.nbytes / s) for ar, s in zip(seconds["AR"], seconds["read"], strict=True)]
    ar_s = sorted(seconds["AR"])[len(seconds["AR"]) // 2]
    note = f"{1e3 * ar_s:.1f} ms a token, {read / ar_s / 1e9:.1f} GB/s"
    rows = [row(f"AR, share of read bandwidth, {NAME}", shares, 0.75, unit="", note=note)]
    for count in VERIFIED:
        wanted = 1.5 if count == 5 else None
        values = ratios(seconds[f"verify {count}"], seconds["AR"])
        rows.append(row(f"verify({count}) ÷ AR step, {NAME}", values, wanted, at_most=True))
    for name in runs:
        if name.startswith("draft"):
            wanted = 0.12 if name == "draft two layers, 8K tokens" else None
            values = ratios(seconds[name], seconds["AR"])
            rows.append(row(f"{name} ÷ AR step, {NAME}", values, wanted, at_most=True))
    return rows


def step(model: DecodeModel, kept: int, count: int) -> Callable[[], float]:
    """Seconds of a pass over so many tokens behind so many entries, and of choosing from its logits."""
    runner = random_runner(model, kept, slots_for(kept), ROOM, "none")
    runner.cache.kept_B.fill_(kept)
    tokens, first = torch.full((1, count), 5), torch.zeros(1, dtype=torch.long)
    rule = Rule()

    def run() -> None:
        rule.choose(model.logits(model.hidden(tokens, first, runner.cache))[:, -1], None)

    return partial(seconds_of, run)


@torch.no_grad()
def teaching(target: PreTrainedModel, sequences: list[Tensor], repeats: int) -> Row:
    """Labelled tokens a second ÷ those of a plain forward pass of Hugging Face's, on equal batches."""
    rows, plain = torch.cat(sequences), huggingface(target)
    labels = Labels(batch_sequences=len(sequences), top_k=32)
    array = rows.numpy()
    runs = {
        "ours": lambda: seconds_of(lambda: label_sequences(target, array, labels)),
        "plain": lambda: seconds_of(lambda: plain(input_ids=rows, use_cache=False)),
    }
    seconds = interleaved(runs, max(3, repeats // 3))
    note = f"{rows.numel() / sorted(seconds['ours'])[len(seconds['ours']) // 2]:.0f} tokens/s, top 32 stored"
    return row(
        f"teach ÷ a plain forward pass, tokens/s, {NAME}",
        ratios(seconds["plain"], seconds["ours"]),
        note=note,
    )


@torch.no_grad()
def against_paper(pair: Pair, repeats: int) -> Row:
    """Decode speed of our loop ÷ that of the paper's decoder: eager, with the same cut, text and rounds."""
    view = view_of("chunk_topk_paper", BUDGET)
    ours, theirs = Ours(pair, view, GAMMA), PaperDecoder(pair, BUDGET)
    accepted = []
    for number in range(len(pair.prompts)):
        (mine, _, rate), (text, _, other) = (one.speculation(number, GAMMA) for one in (ours, theirs))
        plain, _ = ours.plain(number)
        assert mine == text == plain and rate == other, f"{pair.name}: the paper's decoder on prompt {number}"
        accepted.append(rate)
    runs = {
        "ours": over_prompts(pair, lambda n: ours.speculation(n, GAMMA)[1]),
        "theirs": over_prompts(pair, lambda n: theirs.speculation(n, GAMMA)[1]),
    }
    seconds = interleaved(runs, repeats)
    speeds = (1 / mean(seconds[name]) for name in ("ours", "theirs"))
    note = "{:.0f} against {:.0f} tokens/s".format(*speeds)
    return row(
        f"speculation ÷ the paper's decoder, eager, {pair.name}, γ = {GAMMA}",
        ratios(seconds["theirs"], seconds["ours"]),
        1.0,
        note=f"{note}; both accept {100 * mean(accepted):.0f} % of an untrained drafter's proposals",
    )
