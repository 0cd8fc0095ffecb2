"""The pairs of models that decoding is timed on: two that the pipeline trains, and one of realistic cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode.loop import autoregressive, speculate
from pipeline.decode.model import decode_model
from pipeline.decode.runner import Compile, Runner
from pipeline.decode.sampling import GREEDY, Sampler
from pipeline.decode.sources import ModelDrafts
from pipeline.kv.slot_cache import slots_for
from pipeline.kv.views import PrefixView
from pipeline.metrics import Counts
from pipeline.models.build import prepare_model
from pipeline.store.layout import PROMPTS

NEVER: frozenset[int] = frozenset()


@dataclass
class Pair:
    """A target, a drafter and prompts [1, S] of one length; `others` are further prompts."""

    name: str
    target: PreTrainedModel
    drafter: PreTrainedModel
    prompts: list[Tensor]
    new_tokens: int
    others: list[Tensor] = field(default_factory=list)


def trained_pair(name: str, config_file: str, storage: str, prompts: int) -> Pair:
    """The target and the last drafter of a config, trained if they are not there yet."""
    from jobs.stages.pipeline import completed, run_pipeline
    from pipeline.config.files import load_config
    from pipeline.errors import BadData
    from pipeline.models.load import load_model
    from pipeline.store.files import read_rows
    from pipeline.store.rows import Prompt

    config = load_config(Path(config_file), [f"storage={storage}"])
    try:
        trained = completed(config)
    except BadData:
        run_pipeline(config, "train")
        trained = completed(config)
    from transformers import AutoTokenizer

    num_tokens = len(AutoTokenizer.from_pretrained(trained.tokenizer))
    (file,) = (trained.tokenizer.parent / PROMPTS).glob("test-*.jsonl")
    rows = read_rows(file, Prompt)
    tokens = [torch.tensor([row.tokens]) for row in rows]
    return Pair(
        name,
        load_model(trained.target, num_tokens),
        load_model(trained.drafters[config.train.variants[-1].name], num_tokens),
        tokens[:prompts],
        rows[0].max_new_tokens,
        tokens[prompts:],
    )


def realistic_pair() -> Pair:
    """Random weights: a target of 109 million parameters, a drafter of under two."""
    target = random_llama(hidden=768, layers=12, heads=12, intermediate=2048)
    drafter = random_llama(hidden=48, layers=1, heads=4, intermediate=128)
    assert target.num_parameters() >= 90e6 and drafter.num_parameters() <= 2e6
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 32_000, (1, 512), generator=generator) for _ in range(2)]
    return Pair("90M", target, drafter, prompts, 65)


def random_llama(dtype: torch.dtype = torch.float32, device: str = "cpu", **shape: Any) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=32_768,
        tie_word_embeddings=device == "cpu",
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, attn_implementation="budgetdraft", dtype=dtype)
    return prepare_model(model, config.vocab_size)


class Watched(Runner):
    """A runner that adds up the seconds of its model calls."""

    spent = 0.0

    def run(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = super().run(*arguments)
        self.spent += time.perf_counter() - began
        return result


class Ours:
    """A pair in our engine, prefilled, one prompt at a time."""

    def __init__(self, pair: Pair, view: View, most_drafts: int, compile: Compile = "none") -> None:
        self.pair = pair
        target, drafter = decode_model(pair.target), decode_model(pair.drafter)
        length, room = pair.prompts[0].shape[1], pair.new_tokens + most_drafts
        kept = slots_for(length) if view.budget == "full" else view.budget
        self.target = Watched(target, 1, slots_for(length), room, compile)
        self.drafter = Watched(drafter, 1, kept, room, compile)
        self.views: list[tuple[list[PrefixView], list[PrefixView], int]] = []
        for prompt in pair.prompts:
            full, logits = target.prefill(prompt, [(length, FULL)])
            sparse, _ = drafter.prefill(prompt, [(length, view)])
            self.views.append((full, sparse, int(logits.argmax())))

    def load(self, number: int) -> list[int]:
        full, sparse, first = self.views[number]
        self.target.cache.load(full)
        self.drafter.cache.load(sparse)
        return [first]

    def plain(self, number: int, runner: Runner | None = None) -> tuple[list[int], float]:
        """Greedy tokens, and decode seconds a token, of the target or of another runner alone."""
        firsts = self.load(number)
        began = time.perf_counter()
        steps = list(autoregressive(runner or self.target, firsts, self.pair.new_tokens, NEVER, GREEDY))
        seconds = time.perf_counter() - began
        return [*firsts, *(step[0] for step in steps if step[0] is not None)], seconds / len(steps)

    def speculation(
        self, number: int, gamma: int, sampler: Sampler = GREEDY
    ) -> tuple[list[int], float, float]:
        """Tokens, decode seconds a token, and the acceptance rate."""
        firsts = self.load(number)
        began = time.perf_counter()
        rounds = [
            round_
            for (round_,) in speculate(
                self.target, ModelDrafts(self.drafter), firsts, gamma, self.pair.new_tokens, NEVER, sampler
            )
            if round_ is not None
        ]
        seconds = time.perf_counter() - began
        tokens = [*firsts, *(token for round_ in rounds for token in round_.tokens)]
        accepted = Counts.of(rounds, gamma).acceptance
        assert accepted is not None, "no round proposed anything"
        return tokens, seconds / (len(tokens) - 1), accepted


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
