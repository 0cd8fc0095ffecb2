"""Small targets with heads over their hidden states, and the two ready to decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode.feature_head import HeadDrafts, LeanHead
from pipeline.decode.model import decode_model
from pipeline.decode.runner import Compile, Runner
from pipeline.decode.target_reader import TargetReader
from pipeline.kv.slot_cache import slots_for
from pipeline.kv.view_cache import ATTENTION
from pipeline.models.build import prepare_model
from pipeline.models.heads.begin import head_of
from pipeline.models.heads.eagle import FeatureHead
from tests.helpers.pairs import Pair
from tests.helpers.tiny import VOCABULARY

STEPS = 60  # of training
# What of a head is a choice: none, EAGLE-3.1's, and the residual's.
OPTIONS = ({}, {"fc_norm": True, "norm_output": True}, {"norm_before_residual": True})


def six_layers(seed: int = 0, **changes: int) -> PreTrainedModel:
    """A target with so many layers that the default features differ, and whose text is not one token."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    torch.manual_seed(seed)
    config = LlamaConfig(**(shape | changes), initializer_range=0.15)
    model = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION)
    return prepare_model(model, VOCABULARY)


def prompt(length: int, seed: int) -> Tensor:
    """Random tokens [1, length]."""
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def trained_head(target: PreTrainedModel, prompts: Sequence[Tensor], **options: bool) -> FeatureHead:
    """A head that is right about half the time: trained on the target's own text behind these prompts."""
    count, depth = 36, 4
    texts = [
        target.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        for tokens in prompts
    ]
    seen = torch.cat([text[0, -count:] for text in texts]).bincount(minlength=VOCABULARY)
    proposable = seen.topk(int((seen > 0).sum()) - 3).indices.sort().values  # but for a few of its tokens
    head = head_of(target, proposable, [1, 3, 5], **options).train()
    large = decode_model(target)
    large.feature_layers = tuple(head.config.feature_layers)
    features = [large.read(text, [])[2] for text in texts]
    place = torch.full((VOCABULARY,), -100)
    place[proposable] = torch.arange(len(proposable))
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-3)
    for step in range(STEPS):
        text, read = texts[step % len(texts)], features[step % len(texts)]
        assert read is not None
        start, loss = text.shape[1] - count, torch.zeros(())
        views = [FULL, View("streaming", 16)]
        for at, out in enumerate(head(text, read, [start], count - 1, views, depth)):
            wanted = place[text[:, start + 1 + at :]].repeat(len(views), 1)
            logits = head.lm_head(out[:, : count - 1 - at])
            loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.eval()


class HeadPair(NamedTuple):
    """A target and a head behind prompts; `source` makes what a run drafts with."""

    pair: Pair
    last_BF: Tensor

    def source(self, threshold: float = 0.0) -> HeadDrafts:
        return HeadDrafts(self.pair.drafter, self.last_BF, threshold)


def head_pair(
    target: PreTrainedModel,
    head: FeatureHead,
    prompts: Sequence[Tensor],
    view: View,
    room: int,
    compile: Compile = "none",
) -> HeadPair:
    """One row for each prompt [1, S]."""
    large = decode_model(target)
    small = LeanHead(head, TargetReader(large))
    full, kept, firsts = [], [], []
    for prompt in prompts:
        (whole,), logits = large.prefill(prompt, [(prompt.shape[1], FULL)])
        full.append(whole)
        kept += small.prefill(prompt, [(prompt.shape[1], view)], whole.guiding())[0]
        firsts.append(int(logits.argmax()))
    runners = [
        Runner(model, len(prompts), slots_for(max(v.kept for v in of)), room, compile)
        for model, of in ((large, full), (small, kept))
    ]
    runners[0].cache.load(full)
    runners[1].cache.load(kept)
    return HeadPair(Pair(*runners, firsts), torch.cat([view.last for view in kept if view.last is not None]))
