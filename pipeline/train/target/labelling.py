"""What the target says of tokens: its labels, texts of its own, and how far others' texts are its own.

A greedy text is the target's where every token is the arg-max of its logits behind the tokens before. Another
program, precision or batch rounds otherwise, so near a tie a text may part from what the target would have
written here; all its other tokens are still the arg-max behind their own prefix. So the share of such tokens
says whether an engine runs this target. Of a sampled text no token is wrong; it comes with the arg-max that
its writer had at each of its places, and that is compared.

Shape legend: R texts; B prompts of S tokens; N sequences of L tokens, P of their positions at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.axes import FULL
from pipeline.config.train import Labels
from pipeline.decode.lean import side_by_side
from pipeline.decode.loop import Noted, autoregressive_noted
from pipeline.decode.model import DecodeModel, kept_inputs
from pipeline.decode.runner import Runner
from pipeline.decode.sampling import Sampler
from pipeline.decode.steps import note
from pipeline.errors import BadData, NotFinite
from pipeline.kv.guides import Ranking
from pipeline.kv.refresh import chunk_shares
from pipeline.kv.slot_cache import slots_for
from pipeline.store.rows import Prompt
from pipeline.train.target.features import half

POSITIONS = 1024  # positions whose logits are labelled at a time


class Text(NamedTuple):
    """A text, and its writer's arg-max at each of its places: of a greedy one its tokens, −1 if not known."""

    tokens: list[int]
    best: list[int]


class Engine(Protocol):
    """Who writes texts in the target's place, or has written them.

    `field` of the config asks for it; `said` and `advice` are of what it wrote, for errors.
    """

    field: str
    said: str
    advice: str
    least_agreement: float

    def write(
        self, prompts: Mapping[str, Sequence[int]], count: int, ends: bool, copies: int = 1
    ) -> dict[str, list[Text] | None]:
        """By the prompts' names, so many texts behind each: `count` tokens, fewer where an EOS `ends` one.

        None stands for a text that cannot be read as tokens, or that ends elsewhere. A prompt that is not
        among them is left to the target.

        Raises:
            BadData: if a prompt is refused, or answered by what is no text of this target's tokens.
            Incomplete: if the engine does not answer in time.
        """
        ...


@dataclass(frozen=True)
class Agreement:
    """Of the tokens of an engine's text, how many are the target's arg-max."""

    prompt: str
    tokens: int
    matching: int

    @property
    def share(self) -> float:
        return self.matching / self.tokens if self.tokens else 1.0


def agreement(
    prompt: str, texts: Sequence[Text] | None, best_RA: np.ndarray, never: frozenset[int] = frozenset()
) -> Agreement:
    """How far the R texts behind a prompt are the target's, whose arg-max at their places, and maybe behind
    them, is `best_RA`.

    A text that cannot be read counts as one other token. Places where the arg-max is a token that the text
    was `never` to have say nothing.
    """
    if texts is None:
        return Agreement(prompt, 1, 0)
    pairs = [
        (theirs, own)
        for text, row in zip(texts, best_RA.tolist(), strict=True)
        for theirs, own in zip(text.best, row, strict=False)
        if theirs >= 0 and own not in never
    ]
    return Agreement(prompt, len(pairs), sum(theirs == own for theirs, own in pairs))


def shares(told: Sequence[Agreement], left: int = 0) -> np.ndarray:
    """Of each prompt, as it is stored; NaN of those that are `left` to the target."""
    return np.array([one.share for one in told] + [np.nan] * left)


def of_engine(engine: Engine, share: np.ndarray) -> dict[str, int]:
    """How many prompts an engine had texts for, how many of them were refused, and those without any."""
    return {
        "served": int(np.isfinite(share).sum()),
        "refused": int((share < engine.least_agreement).sum()),
        "missing": int(np.isnan(share).sum()),
    }


def refused(told: Sequence[Agreement], engine: Engine) -> set[str]:
    """The prompts whose texts the target has to write itself.

    Raises:
        BadData: if the texts together are below the threshold by more than one token: then it is no rounding,
            and the engine does not run this target.
    """
    least = engine.least_agreement
    tokens, matching = sum(one.tokens for one in told), sum(one.matching for one in told)
    if tokens - matching > max(1.0, (1 - least) * tokens):
        worst = min(told, key=lambda one: one.share)
        raise BadData(
            f"{engine.field}: of {tokens} {engine.said}, {matching / tokens:.2%} are the target's arg-max, "
            f"and {least:.2%} have to be; behind {worst.prompt} it is {worst.share:.2%} of {worst.tokens}. "
            f"{engine.advice}, or leave {engine.field} out: then the target writes"
        )
    return {one.prompt for one in told if one.share < least}


def smallest_uint(num_tokens: int) -> type[np.unsignedinteger]:
    return np.uint16 if num_tokens <= 1 << 16 else np.uint32


@torch.inference_mode()
def label_sequences(
    target: PreTrainedModel,
    rows_NL: np.ndarray,
    labels: Labels,
    feature_layers: Sequence[int] = (),
    ranking: Ranking | None = None,
) -> dict[str, np.ndarray]:
    """The target's labels at every position of N sequences, features and guides; `argmax` is the last entry.

    Raises:
        NotFinite: if a logit is NaN or infinite.
    """
    num_tokens = int(target.num_tokens)
    kind = smallest_uint(num_tokens)
    batches: list[dict[str, np.ndarray]] = []
    for at in range(0, len(rows_NL), labels.batch_sequences):
        tokens_BL = torch.from_numpy(rows_NL[at : at + labels.batch_sequences].astype(np.int64))
        ranker = ranking.ranker(target, ranking.places) if ranking else None
        with kept_inputs(target, feature_layers) as kept:
            tokens_BL = tokens_BL.to(target.device)
            logits_BLV = target(input_ids=tokens_BL, use_cache=False, view_cache=ranker).logits
        # In slices, so that what is computed from the logits stays small beside them.
        pieces = [
            label_logits(target.name_or_path, logits_BPV, labels, kind)
            for logits_BPV in logits_BLV[..., :num_tokens].split(POSITIONS, dim=1)
        ]
        features = side_by_side(kept, feature_layers)
        given = {} if features is None else {"features": half(features)}
        if ranking and ranker:
            given["guide"] = ranking.stored(ranker)
        batches.append(
            given | {name: np.concatenate([p[name] for p in pieces], axis=1) for name in pieces[0]}
        )
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def label_logits(
    name: str, logits_BPV: Tensor, labels: Labels, kind: type[np.unsignedinteger]
) -> dict[str, np.ndarray]:
    """The labels that a target's logits give, by the names of their files; `argmax` is the last entry.

    Raises:
        NotFinite: if a logit is NaN or infinite.
    """
    if not torch.isfinite(logits_BPV).all():
        raise NotFinite(f"{name}: logits not finite while labelling")
    made: dict[str, np.ndarray] = {}
    if labels.top_k:
        top = logits_BPV.topk(min(labels.top_k, logits_BPV.shape[-1]), dim=-1)
        total_BP1 = (logits_BPV.float() / labels.temperature).logsumexp(-1, keepdim=True)
        log_probs_BPK = top.values.float() / labels.temperature - total_BP1
        made["ids"] = top.indices.cpu().numpy().astype(kind)
        made["log_probs"] = log_probs_BPK.cpu().numpy().astype(np.float16)
    return {**made, "argmax": logits_BPV.argmax(-1).cpu().numpy().astype(kind)}


def write_ahead(
    target: DecodeModel, tokens_BS: Tensor, count: int, eos: frozenset[int], sampler: Sampler
) -> list[list[Noted]]:
    """The target's continuation of each of B prefixes of equal length: up to `count` tokens, or to EOS.

    Raises:
        NotFinite: if a logit is NaN or infinite.
    """
    return write_on(*behind_prefixes(target, tokens_BS, count)[:2], count, eos, sampler)


def behind_prefixes(
    target: DecodeModel, tokens_BS: Tensor, room: int, copies: int = 1, guided: bool = False
) -> tuple[Runner, Tensor, Tensor | None, Tensor | None]:
    """The target with so much room behind each prefix, as often as `copies`, and the logits [R, V] there; the
    features [R, S, F] of the prefixes where the target gives some; if `guided` the guide [B, C] of each."""
    B, S = tokens_BS.shape
    (view,), logits_BV, features_BSF = target.read(tokens_BS, [(S, FULL)])
    runner = Runner(target, B * copies, slots_for(S), room, "none")
    for row in range(B * copies):
        runner.cache.load_row(row, view, row // copies)
    if not torch.isfinite(logits_BV).all():
        raise NotFinite(f"{target.name}: logits not finite behind a prefix of {S} tokens")
    repeated = None if features_BSF is None else features_BSF.repeat_interleave(copies, 0)
    guide_BC = view.guiding()[S] if guided else None
    return runner, logits_BV.repeat_interleave(copies, 0), repeated, guide_BC


@torch.no_grad()
def text_shares(target: Runner, texts: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """[M - 1, C] of each text, one behind each prefix of the target's, from one more pass over all of them.

    A text of one token is left out: nothing is drafted there.
    """
    longest = max(len(text) for text in texts.values())
    if longest < 2:
        return {}
    target.cache.note_queries()
    width = max(2, longest - 1)  # queries are kept of tokens that are read together
    read_BQ = [[*text[:-1], *[0] * (width + 1 - len(text))] for text in texts.values()]
    tokens_BQ = torch.tensor(read_BQ, device=target.model.geometry.device)
    target.model.hidden(tokens_BQ, torch.zeros_like(tokens_BQ[:, 0]), target.cache)
    return {
        name: torch.cat([chunk_shares(target.cache, row, step, 1) for step in range(len(text) - 1)])
        for row, (name, text) in enumerate(texts.items())
        if len(text) > 1
    }


@torch.no_grad()
def write_on(
    runner: Runner, logits_RV: Tensor, count: int, eos: frozenset[int], sampler: Sampler
) -> list[list[Noted]]:
    """A text behind each row's prefix, whose logits are given."""
    first_R = sampler.choose(logits_RV)
    columns = (first_R, *note(sampler.rule, logits_RV, first_R))
    texts = [[Noted(*chosen)] for chosen in zip(*(values.tolist() for values in columns), strict=True)]
    for step in autoregressive_noted(runner, first_R.tolist(), count, eos, sampler):
        for text, chosen in zip(texts, step, strict=True):
            text += [] if chosen is None else [chosen]
    return texts


def is_on_policy(seed: int, index: int, fraction: float) -> bool:
    """Whether the target rewrites all windows of this sequence; drawn from the seed and its number."""
    return fraction > 0 and np.random.default_rng([seed, 7, index]).random() < fraction


def equal_length_batches(prompts: list[Prompt], size: int) -> list[list[Prompt]]:
    """Batches of prompts with the same length and limit, in a stable order."""
    groups: dict[tuple[int, int], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((len(prompt.tokens), prompt.max_new_tokens), []).append(prompt)
    return [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]
