"""The budgeted cache inside transformers' own assisted generation: `generate(assistant_model=…)`.

transformers has no way to hand the assistant a cache: `AssistedCandidateGenerator` leaves `past_key_values`
out of what it passes on, and the assistant's first `generate` makes one. So what goes in as `assistant_model`
is a `BudgetedAssistant`, whose first `generate` reads the prefix, cuts it, and goes on from there.

Shape legend: B batch rows, H key/value heads, S prefix length, N kept entries, Q new tokens, D head width.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from pipeline.axes import check_budget, kept_positions
from pipeline.decode.model import decode_model
from pipeline.kv.policies import GUIDED, WINDOW
from pipeline.kv.view_cache import ATTENTION
from pipeline.kv.views import PrefixView, view_of
from pipeline.models.build import prepare_model


class BudgetedLayer(DynamicLayer):
    """One layer's kept KV of a prefix, [B, H, N, D], and all KV behind it, for attention of transformers.

    Its length is counted with the evicted entries, from which transformers takes the positions of new tokens.
    In the causal mask the kept entries count as the last ones before the continuation, which sees them all.
    """

    def __init__(self, keys_BHND: Tensor, values_BHND: Tensor, prefix_tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(keys_BHND, values_BHND)
        self.keys, self.values = keys_BHND, values_BHND
        self.evicted = prefix_tokens - keys_BHND.shape[2]

    def get_seq_length(self) -> int:
        return self.evicted + self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, self.evicted


class BudgetedAssistant:
    """A drafter as `assistant_model`: at most `budget` entries of the prompt, γ proposals a round.

    The view is that of the prompt without its last token, since the assistant has to read a token before it
    proposes: this engine has the same view, and makes the same proposals, of a prompt that is one token
    shorter. What is not defined here is the drafter's own.

    Args:
        drafter: as `AutoModelForCausalLM.from_pretrained` loads it.
        policy: of `pipeline.kv.policies`.
        budget: entries that are kept per layer and KV head; "full" keeps all.
        gamma: proposals a round.

    Raises:
        ValueError: for a budget that no sweep could have, or a drafter under the attention of `load_model`.
    """

    def __init__(
        self, drafter: PreTrainedModel, policy: str, budget: int | Literal["full"], gamma: int
    ) -> None:
        check_budget(budget)
        if drafter.config._attn_implementation == ATTENTION:
            raise ValueError(
                "the drafter was loaded by pipeline.models.load_model, whose attention does not see "
                "the caches of transformers: load it with AutoModelForCausalLM.from_pretrained"
            )
        self.drafter = prepare_model(drafter, drafter.config.vocab_size)
        if policy == WINDOW:
            raise ValueError("a window rolls, which these caches of transformers do not: take streaming")
        if policy == GUIDED:
            raise ValueError("target_guided asks the target, and an assistant has none: take chunk_topk")
        self.view = view_of(policy, budget, positions=kept_positions(drafter.config))
        self.generation_config = copy.deepcopy(drafter.generation_config)
        self.generation_config.num_assistant_tokens = gamma
        self.generation_config.num_assistant_tokens_schedule = "constant"
        self.generation_config.assistant_confidence_threshold = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def generate(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """What transformers calls once a round, with all tokens so far; in the first round there is no cache.

        Raises:
            ValueError: if the attention mask hides a token.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("the prompt has padding: pass one prompt without any, and its attention_mask")
        if past_key_values is None and input_ids.shape[1] > 1:
            view = self.read(input_ids[:, :-1])
            layers = [BudgetedLayer(keys, values, view.prefix_tokens) for keys, values in view.layers]
            past_key_values = Cache(layers=layers)
        everything = torch.ones_like(input_ids)
        return self.drafter.generate(
            input_ids, past_key_values=past_key_values, attention_mask=everything, **arguments
        )

    @torch.no_grad()
    def read(self, tokens_BS: Tensor) -> PrefixView:
        """What the view keeps of a prefix that is read with full attention, layer by layer."""
        own = self.drafter.config._attn_implementation
        self.drafter.set_attn_implementation(ATTENTION)
        try:
            (view,), _ = decode_model(self.drafter).prefill(tokens_BS, [(tokens_BS.shape[1], self.view)])
        finally:
            self.drafter.set_attn_implementation(own)
        return view
