"""A head while decoding: its one layer over a static cache, and the source of its chains.

Continuation token t is read in slot t of the continuation, which sits one position before the token, beside
the target's features of the token before it. A round reads the tokens that the last one emitted, with the
features that verification hands back for them, in place of what the chain had stored there; so a chain always
begins behind true slots.

Shape legend: B rows, Q tokens, F width of the features, H width, T proposals of a round, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.axes import View
from pipeline.decode.lean import Lean, LeanLayer, fuse
from pipeline.decode.products import choose_forms
from pipeline.decode.runner import Runner, compiled
from pipeline.decode.sampling import Rule, Sampler
from pipeline.decode.sources import ModelDrafts, Proposals
from pipeline.decode.target_reader import TargetReader
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.kv.refresh import Refresh
from pipeline.kv.slot_cache import Geometry, SlotCache
from pipeline.kv.views import PrefixView
from pipeline.models.draft_vocabulary import among_all
from pipeline.models.heads.eagle import FeatureHead


class LeanHead(Lean):
    """A head over a target that decodes beside it; `prefill` has the target read the prompt, or finds that it
    has done so for another head or before: then reading is the head's own alone.

    Raises:
        BadData: if the target already gives other features, to another head.
    """

    def __init__(self, module: FeatureHead, reader: TargetReader) -> None:
        config, layer = module.config, module.midlayer
        reader.give(config.feature_layers, module.name_or_path)
        self.module, self.reader = module, reader
        self.name = module.name_or_path or "head"
        self.num_tokens = module.whole_tokens
        self.feature_layers: tuple[int, ...] = ()
        self.draft_tokens = module.lm_head.tokens
        self.heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.geometry = Geometry(1, kv_heads, self.heads // kv_heads, width, module.dtype, module.device)
        self.epsilon, self.activation = config.rms_norm_eps, layer.mlp.act_fn
        self.frequencies = module.rotary.inv_freq.detach()
        self.rotary_scale = float(module.rotary.attention_scaling)
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = LeanLayer(
            layer.input_layernorm.weight.detach(),
            fuse(attention.q_proj, attention.k_proj, attention.v_proj),
            None,
            None,
            fuse(attention.o_proj),
            layer.post_attention_layernorm.weight.detach(),
            fuse(mlp.gate_proj, mlp.up_proj),
            fuse(mlp.down_proj),
        )
        self.fc, self.head = fuse(module.fc), fuse(module.lm_head)
        self.hidden_norm, self.norm = layer.hidden_norm.weight.detach(), module.norm.weight.detach()
        products = (self.layer.query_key_value, self.layer.output, self.layer.gate_up, self.layer.down)
        choose_forms([self.fc, self.head, *products])

    def fuse(self, features: Tensor) -> Tensor:
        """As `FeatureHead.fuse`."""
        if self.module.config.fc_norm:
            norms: list[Any] = [norm.weight for norm in self.module.fc_norm]
            thirds = zip(features.chunk(len(norms), -1), norms, strict=True)
            features = torch.cat([self.rms_norm(third, weight) for third, weight in thirds], -1)
        return self.fc(features)

    def outputs(
        self, tokens_BQ: Tensor, g_BQH: Tensor, step_B: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor]:
        """Of Q tokens, whose KV go into the cache at `step_B` and on: norm z, from which logits are made, and
        what is fed back; both [B, Q, H]."""
        place = cache.place(step_B, tokens_BQ.shape[1])
        assert cache.turns is not None
        cos, sin = (turns[place.rows_B1, place.steps_BQ] for turns in cache.turns)
        read = F.embedding(tokens_BQ, self.module.embedding).to(g_BQH.dtype)
        normed = self.rms_norm(g_BQH, self.hidden_norm)
        both = torch.cat([self.rms_norm(read, self.layer.input_norm), normed], -1)
        query, key, value = self.project(self.layer, both, cos, sin)
        cache.write(0, key, value, place)
        residual = normed if self.module.config.norm_before_residual else g_BQH
        z = residual + self.layer.output(self.attend(query, cache, 0, place))
        z = z + self.mlp(self.layer, z)
        out = self.rms_norm(z, self.norm)
        return out, out if self.module.config.norm_output else z

    def logits(self, hidden: Tensor) -> Tensor:
        return among_all(self.head(hidden), self.draft_tokens, self.num_tokens)

    def prefill(
        self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED
    ) -> tuple[list[PrefixView], Tensor]:
        """The views' slots, and the target's logits."""
        return self.read(tokens_BS, cuts, guides)[:2]

    @torch.no_grad()
    def read(
        self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED
    ) -> tuple[list[PrefixView], Tensor, Tensor | None]:
        logits_BV, features_BSF = self.reader.read(tokens_BS)
        views = self.module.prefix(tokens_BS, features_BSF.to(self.module.dtype), cuts, guides)
        for view in views:
            view.last = features_BSF[:, view.prefix_tokens]
        return views, logits_BV, features_BSF

    def hidden(self, tokens_BQ: Tensor, step_B: Tensor, cache: SlotCache) -> Tensor:
        raise AssertionError("a head reads features beside its tokens")

    def hidden_and_features(
        self, tokens_BQ: Tensor, step_B: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("a head reads features beside its tokens")


Chosen = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]

# ── steps ─────────────────────────────────────────────────────────────────────────────────────────


def begin_chain(
    model: LeanHead,
    cache: SlotCache,
    rule: Rule,
    tokens_BQ: Tensor,
    features_BQF: Tensor,
    step_B: Tensor,
    last_B: Tensor,
    uniform_B: Tensor | None,
) -> Chosen:
    """Read Q emitted tokens with true features, the first being continuation token `step_B`, and choose what
    follows number `last_B` of them; those behind it are no text.

    Returns:
        The token [B, 1], its number [B], the best logit [B], when sampling all probabilities [B, V], the
        probability [B] of the token, and what is fed back [B, 1, H].
    """
    out, fed = model.outputs(tokens_BQ, model.fuse(features_BQF.to(model.geometry.dtype)), step_B, cache)
    at = last_B.view(-1, 1, 1).expand(-1, 1, out.shape[-1])
    return choose(model, rule, out.gather(1, at), fed.gather(1, at), step_B + last_B + 1, uniform_B)


def extend_chain(
    model: LeanHead,
    cache: SlotCache,
    rule: Rule,
    token_B1: Tensor,
    fed_B1H: Tensor,
    step_B: Tensor,
    uniform_B: Tensor | None,
) -> Chosen:
    """Read a proposal beside the head's own output; returns as `begin_chain`."""
    out, fed = model.outputs(token_B1, fed_B1H, step_B, cache)
    return choose(model, rule, out, fed, step_B + 1, uniform_B)


def choose(
    model: LeanHead, rule: Rule, out_B1H: Tensor, fed_B1H: Tensor, step_B: Tensor, uniform_B: Tensor | None
) -> Chosen:
    logits_BV = model.logits(out_B1H[:, -1])
    token_B, best_B, q_BV = rule.choose(logits_BV, uniform_B)
    shares_BV = logits_BV.float().softmax(-1) if q_BV is None else q_BV
    sure_B = shares_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)
    return token_B.unsqueeze(1), step_B, best_B, q_BV, sure_B, fed_B1H


def draft_chain(
    begin: Callable[..., Any],
    extend: Callable[..., Any],
    count: int,
    tokens_BQ: Tensor,
    features_BQF: Tensor,
    step_B: Tensor,
    last_B: Tensor,
    uniforms_TB: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`count` proposals, one after the other; returns as `steps.draft`."""
    uniform = [None] * count if uniforms_TB is None else list(uniforms_TB)
    made = [begin(tokens_BQ, features_BQF, step_B, last_B, uniform[0])]
    for number in range(1, count):
        token_B1, at_B, _, _, _, fed_B1H = made[-1]
        made.append(extend(token_B1, fed_B1H, at_B, uniform[number]))
    tokens, _, bests, probabilities, _, _ = zip(*made, strict=True)
    q_BTV = None if probabilities[0] is None else torch.stack(probabilities, 1)
    return torch.cat(tokens, 1), torch.stack(bests, 1), q_BTV


class HeadDrafts(ModelDrafts):
    """A head behind its view.

    Args:
        last_BF: the target's features of each prompt's last token.
        threshold: as of `ModelDrafts`.
    """

    def __init__(
        self, runner: Runner, last_BF: Tensor, threshold: float = 0.0, refresh: Refresh | None = None
    ) -> None:
        super().__init__(runner, threshold, refresh)
        self.round: tuple[Tensor, Tensor, Tensor] | None = None
        self.last_BF = last_BF
        assert isinstance(runner.model, LeanHead)
        runner.model.reader.forget()

    def propose(
        self, sampler: Sampler, gamma: int, unread_BQ: Tensor, step_B: Tensor, open_rows: Sequence[bool]
    ) -> Proposals:
        last_B = step_B + unread_BQ.shape[1] - 1
        if unread_BQ.shape[1] == 1:  # texts begin with one token, and go on behind two
            self.round = None
        if self.round is None:
            unread = (unread_BQ, self.last_BF.unsqueeze(1), step_B, torch.zeros_like(step_B))
        else:
            emitted_BQ, features_BQF, accepted_B = self.round
            accepted_B = accepted_B.minimum(last_B)  # a row that has ended is at the beginning of its room
            unread = (emitted_BQ, features_BQF, last_B - accepted_B, accepted_B)
        uniforms_TB = sampler.uniforms(gamma, by_row=False)
        begin, extend = (partial(self.step, step, sampler.rule) for step in (begin_chain, extend_chain))
        if self.threshold > 0:
            following = self.walk(partial(begin, *unread), extend)
            return self.propose_until(following, gamma, uniforms_TB, open_rows)
        runner = self.runner
        if runner.compile == "cudagraphs":
            begin, extend = (
                partial(compiled(step), runner.model, runner.cache, sampler.rule)
                for step in (begin_chain, extend_chain)
            )
            chain = partial(draft_chain, begin, extend, gamma)
            graph = ("chain", gamma)
            return Proposals(*runner.run(chain, sampler.rule, (*unread, uniforms_TB), graph))
        return Proposals(*draft_chain(begin, extend, gamma, *unread, uniforms_TB))

    def step(self, step: Callable[..., Any], rule: Rule, *arguments: Tensor | None) -> Any:
        return self.runner.run(step, rule, arguments)

    def walk(self, begin: Callable[..., Chosen], extend: Callable[..., Chosen]) -> Callable[..., Chosen]:
        """A function that gives the next proposal each time, as `runner.propose_surely` does."""
        last: list[Chosen] = []

        def following(uniform_B: Tensor | None) -> Chosen:
            if last:
                token_B1, at_B, _, _, _, fed_B1H = last.pop()
                last.append(extend(token_B1, fed_B1H, at_B, uniform_B))
            else:
                last.append(begin(uniform_B))
            return last[0]

        return following

    def observe(self, report_BR: Tensor, features_BQF: Tensor | None, step_B: Tensor) -> None:
        """The tokens of a round, as verification reports them, become what the next round reads first."""
        assert features_BQF is not None, "a target that verifies for a head gives features"
        super().observe(report_BR, features_BQF, step_B)
        self.round = (report_BR[:, 3:], features_BQF, report_BR[:, 0])


def drafts(
    runner: Runner, views: Sequence[PrefixView], threshold: float = 0.0, refresh: Refresh | None = None
) -> ModelDrafts:
    """The source of a model that is loaded behind these views, one a row."""
    if not isinstance(runner.model, LeanHead):
        return ModelDrafts(runner, threshold, refresh)
    last_BF = torch.cat([view.last for view in views if view.last is not None])
    return HeadDrafts(runner, last_BF, threshold, refresh)
