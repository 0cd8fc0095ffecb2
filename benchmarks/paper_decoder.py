"""Greedy decoding as the paper's code does it, on transformers' modules: what our loop is timed against.

Target and drafter are prefilled apart. The drafter's whole cache is made before it is cut, and the partial
last chunk of the prefix is dropped. In a round the drafter proposes γ tokens, one pass each, and the target
reads them in one; what it refuses is cropped from both caches, which grow by concatenation.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.baselines import huggingface
from benchmarks.pairs import Pair
from pipeline.kv.policies import chunk_topk_paper
from pipeline.metrics import Counts, Round, counted_proposals


class PaperDecoder:
    """A pair, prefilled, one prompt at a time, the drafter behind `budget` entries; texts have no end."""

    @torch.no_grad()
    def __init__(self, pair: Pair, budget: int) -> None:
        self.pair = pair
        self.target, self.drafter = huggingface(pair.target), huggingface(pair.drafter)
        self.begun: list[tuple[DynamicCache, DynamicCache, int]] = []
        for prompt_1S in pair.prompts:
            whole, cut = DynamicCache(), DynamicCache()
            logits_1SV = read(self.target, prompt_1S, 0, whole)
            read(self.drafter, prompt_1S, 0, cut)
            for layer in cut.layers:
                kept_BHN1 = chunk_topk_paper(layer.keys, layer.keys, budget).unsqueeze(-1)
                layer.keys = layer.keys.take_along_dim(kept_BHN1, 2)
                layer.values = layer.values.take_along_dim(kept_BHN1, 2)
            self.begun.append((whole, cut, int(logits_1SV[0, -1].argmax())))

    @torch.no_grad()
    def speculation(self, number: int, gamma: int) -> tuple[list[int], float, float]:
        """Tokens, decode seconds a token, and the acceptance rate."""
        whole, cut, first = copy.deepcopy(self.begun[number])
        prefix, limit = self.pair.prompts[number].shape[1], self.pair.new_tokens
        tokens, seen, rounds = [first], 0, []  # `seen` of the tokens are in the drafter's cache
        began = time.perf_counter()
        while len(tokens) < limit:
            count, drafts = len(tokens), []
            unread_1T = torch.tensor([tokens[seen:]])
            for step in range(gamma):
                at = prefix + (count + step - unread_1T.shape[1])
                unread_1T = read(self.drafter, unread_1T, at, cut)[:, -1:].argmax(-1)
                drafts.append(unread_1T)
            proposed_1T = torch.cat([torch.tensor([tokens[-1:]]), *drafts], 1)
            best_T = read(self.target, proposed_1T, prefix + count - 1, whole)[0].argmax(-1)
            accepted = int((best_T[:-1] == proposed_1T[0, 1:]).cumprod(0).sum())
            emitted = best_T[: accepted + 1].tolist()[: limit - count]
            tokens += emitted
            seen = count + min(accepted, gamma - 1)
            whole.crop(accepted - gamma)
            cut.crop(seen - (count + gamma - 1))
            counted = counted_proposals(gamma, limit - count, len(emitted), False)
            rounds.append(Round(tuple(emitted), counted, min(accepted, len(emitted))))
        seconds = time.perf_counter() - began
        accepted_rate = Counts.of(rounds, gamma).acceptance
        assert accepted_rate is not None, "no round proposed anything"
        return tokens, seconds / (len(tokens) - 1), accepted_rate


def read(model: PreTrainedModel, tokens_1T: Tensor, first: int, cache: DynamicCache) -> Tensor:
    """Logits [1, T, V] behind each token, of which the first has this position."""
    positions_1T = torch.arange(first, first + tokens_1T.shape[1]).unsqueeze(0)
    logits_1TV: Tensor = model(
        input_ids=tokens_1T, position_ids=positions_1T, past_key_values=cache, use_cache=True
    ).logits
    return logits_1TV
