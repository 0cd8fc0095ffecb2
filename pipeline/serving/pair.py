"""A trained drafter in use: a target and a drafter from their folders, and prompts that they continue.

`budgetdraft generate` and other Python programs use the same; decoding and its clock are those of the sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.axes import Positions, View, check_budget, kept_positions
from pipeline.data.tokenizer import encode_prompt
from pipeline.decode.bench import Bench, timed_prefill
from pipeline.decode.feature_head import LeanHead, drafts
from pipeline.decode.loop import speculate
from pipeline.decode.model import DecodeModel, decode_model
from pipeline.decode.runner import Compile, Runners
from pipeline.decode.sampling import Chance
from pipeline.decode.sources import DraftSource
from pipeline.decode.target_reader import TargetReader
from pipeline.errors import BadData
from pipeline.kv.guides import are_guided
from pipeline.kv.views import placed, view_of
from pipeline.models.generation import stop_tokens, warn_of_settings
from pipeline.models.heads.load import is_head, load_head
from pipeline.models.hub import model_folder
from pipeline.models.layers import share_frozen
from pipeline.models.limits import Limit, limits_of_loaded
from pipeline.models.load import ModelRef, load_model, pick_device, shared_tokens
from pipeline.store.rows import Prompt


@dataclass
class Reading:
    """Prompts that both models have read, ready to be continued until the pair reads others."""

    bench: Bench
    source: DraftSource
    gamma: int
    eos: frozenset[int]

    def stream(self, chance: Chance) -> Iterator[list[list[int]]]:
        """All tokens so far of each prompt: after the prefill, then after every round."""
        firsts, sampler = self.bench.start(chance)
        written = [[first] for first in firsts]
        yield written
        limit, eos = self.bench.limit, self.eos
        for rounds in speculate(self.bench.target, self.source, firsts, self.gamma, limit, eos, sampler):
            for tokens, one in zip(written, rounds, strict=True):
                tokens += one.tokens if one else ()
            yield written


@dataclass
class Pair:
    """A target and a drafter, the tokenizer that they share, and the caches that they decode with.

    `limits` say, by role, how long a text either model can read; `positions` where the drafter was trained to
    find what is kept.
    """

    tokenizer: PreTrainedTokenizerBase
    target: DecodeModel
    drafter: DecodeModel
    eos: frozenset[int]
    runners: Runners = field(repr=False)
    limits: Mapping[str, Sequence[Limit]] = field(default_factory=dict, repr=False)
    positions: Positions = "true"

    def continue_prompts(
        self,
        prompts: Sequence[str],
        policy: str,
        budget: int | Literal["full"],
        gamma: int,
        max_new_tokens: int,
        threshold: float = 0.0,
        temperature: float = 0.0,
        seed: int = 0,
        sinks: int = 0,
    ) -> list[str]:
        """The target's own continuations, decoded together: its greedy ones, or samples at a temperature.

        Args:
            policy: which prefix entries the drafter keeps; see `pipeline.kv.policies`.
            budget: how many of them, per layer and KV head; "full" keeps all.
            gamma: proposals a round.
            max_new_tokens: the most tokens of each continuation.
            threshold: stop drafting behind a proposal with less probability; 0 drafts γ.
            temperature: 0 is greedy.
            seed: of sampling.
            sinks: first entries that the policy window always sees.

        Raises:
            BadData: if there is no prompt, an empty one, or one that is too long for either model.
            ValueError: for a policy or budget that does not exist.
        """
        check_budget(budget)
        reading = self.read(prompts, view_of(policy, budget, sinks), gamma, max_new_tokens, threshold)
        *_, written = reading.stream(Chance(temperature, seed))
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]

    def read(
        self, prompts: Sequence[str], view: View, gamma: int, max_new_tokens: int, threshold: float
    ) -> Reading:
        """Let both models read the prompts, the drafter behind a view of each.

        Raises:
            BadData: if there is no prompt, an empty one, or one that is too long for either model.
        """
        if not prompts:
            raise BadData("there is no prompt to continue")
        asked = [self.prompt(number, text, max_new_tokens) for number, text in enumerate(prompts)]
        return self.read_tokens(asked, view, gamma, threshold)

    def read_tokens(self, asked: Sequence[Prompt], view: View, gamma: int, threshold: float = 0.0) -> Reading:
        """As `read`, of prompts with equal limits that are tokens already."""
        self.check_length(max(len(prompt.tokens) for prompt in asked), asked[0].max_new_tokens, gamma)
        bench = Bench(self.runners, self.target, asked, gamma, guided=are_guided([view]))
        wanted = [placed(view, self.positions)]
        views = [
            timed_prefill(self.drafter, prompt, wanted, guides=guides)[0][0]
            for prompt, guides in zip(asked, bench.guides, strict=True)
        ]
        source = drafts(bench.drafter(self.drafter, views), views, threshold)
        return Reading(bench, source, gamma, self.eos)

    def check_length(self, prompt_tokens: int, max_new_tokens: int, gamma: int) -> None:
        """Raise BadData where a model reads texts of this length otherwise than it should, or not at all.

        Drafting looks up to γ positions beyond the end of a text.
        """
        needed = prompt_tokens + max_new_tokens + gamma
        for role, limits in self.limits.items():
            for limit in limits:
                if limit.tokens < needed:
                    raise BadData(
                        f"the {role} {limit.reason}, and a prompt of {prompt_tokens:,} tokens, "
                        f"max_new_tokens ({max_new_tokens:,}) and γ ({gamma}) ask for {needed:,}: lower one"
                    )

    def prompt(self, number: int, text: str, max_new_tokens: int) -> Prompt:
        """A prompt as the sweep has them.

        Raises:
            BadData: if it is empty, or holds a pad token for which the models have no embedding.
        """
        tokens = encode_prompt(self.tokenizer, text) if text else []
        if not tokens:
            raise BadData("the prompt is empty")
        if max(tokens) >= self.target.num_tokens:
            raise BadData(
                f"the prompt holds {self.tokenizer.pad_token!r}, which the models have no embedding for"
            )
        return Prompt(
            prompt_id=str(number),
            document_id=str(number),
            dataset="serving",
            context="serving",
            split="test",
            tokens=tokens,
            max_new_tokens=max_new_tokens,
        )


def load_pair(
    target: str | Path | ModelRef,
    drafter: str | Path | ModelRef,
    tokenizer: str | Path | None = None,
    device: str = "auto",
    compile: Compile = "none",
    prefill_chunk: int = 2048,
    max_tokens: int | None = None,
) -> Pair:
    """Load a target and a drafter.

    Args:
        target: a folder or hub id; a `ModelRef` where more than the path is to be said, such as the dtype.
        drafter: likewise; a folder that the pipeline has made, or `budgetdraft pull` has fetched.
        tokenizer: its folder; default: the drafter's, where the pipeline puts the one that both share.
        device: "auto" is the GPU where there is one.
        compile: "inductor", or "cudagraphs" on a GPU; a shape is compiled when it first comes up.
        prefill_chunk: tokens of a prefix that are computed at once.
        max_tokens: the most tokens of a prompt, its continuation and γ together. Only a model that depends
            on it has to be told: one with sliding windows, or with rope_type dynamic or longrope.

    Raises:
        BadData: if there is no model or tokenizer in a folder, the target has another vocabulary, or a model
            cannot be run, or not on such long texts.
        ValueError: if a GPU is asked for and there is none.
    """
    target, drafter = (
        replace(ref, role=role, reach=max_tokens or ref.reach, proposes=role == "drafter")
        for role, given in (("target", target), ("drafter", drafter))
        for ref in [given if isinstance(given, ModelRef) else ModelRef(str(given))]
    )
    folder = Path(tokenizer) if tokenizer else model_folder(drafter)
    try:
        shared = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BadData(f"{folder} holds no tokenizer: name the folder of one as `tokenizer`") from error
    num_tokens = shared_tokens(shared, target, drafter)
    model = load_model(target, num_tokens, pick_device(device))
    warn_of_settings(model)
    large, limits = decode_model(model, prefill_chunk), {"target": limits_of_loaded(model)}
    small: DecodeModel
    if is_head(model_folder(drafter)):  # it turns positions as its target does
        other = load_head(drafter, model, pick_device(device))
        small = LeanHead(other, TargetReader(large))
    else:
        other = load_model(drafter, num_tokens, pick_device(device))
        share_frozen(other, [model])
        small, limits["drafter"] = decode_model(other, prefill_chunk), limits_of_loaded(other)
    at = kept_positions(other.config)
    return Pair(shared, large, small, stop_tokens(model), Runners(compile), limits, at)
