"""The two objectives of the training loop: next-token pretraining, and the drafter's two-branch loss."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.axes import FULL, Budget, View
from pipeline.config.models import Pretrain
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.decode import replay
from pipeline.decode.sampling import Rule
from pipeline.errors import NotFinite
from pipeline.kv.guides import UNGUIDED, Guides, stored_guide
from pipeline.kv.policies import GUIDED
from pipeline.kv.view_cache import read_prefix
from pipeline.kv.views import view_of
from pipeline.metrics import Counts
from pipeline.models.draft_vocabulary import draft_tokens
from pipeline.store.rows import Continuation, Prompt
from pipeline.train.batches import (
    Draw,
    LabelledSequences,
    Shards,
    Windows,
    batch_indices,
    draw,
    window_guides,
    window_labels,
    windows_of,
)
from pipeline.train.loop import OUTSIDE, WATCHED
from pipeline.train.losses import LOSSES, TargetLabels
from pipeline.train.paths import PathTerm
from pipeline.train.windows import sampled_paths, window_scores


def name_rows(shards: Shards, indices: Sequence[int]) -> str:
    """`train-00000.npy row 3, train-00001.npy row 0`, at most a screen's line and a half."""
    places = []
    for index in indices:
        shard = int(np.searchsorted(shards.offsets, index, side="right")) - 1
        places.append(f"{Path(shards.arrays[shard].filename).name} row {index - shards.offsets[shard]}")
    return textwrap.shorten(", ".join(places), 160, placeholder=" …")


class NextToken:
    """Cross entropy of the next token over whole sequences, or pieces of them."""

    def __init__(
        self,
        config: Config,
        group: Pretrain,
        tokens: Shards,
        validation: Sequence[Prompt],
        device: torch.device,
    ) -> None:
        self.tokens, self.group, self.seed, self.device = tokens, group, config.seed, device
        self.micro = config.train.micro_batch_sequences
        self.length = group.sequence_tokens or config.data.sequence_tokens
        self.spare = config.data.sequence_tokens - self.length
        self.tokens_per_micro = self.micro * (self.length - 1)
        self.step_loss = (
            torch.compile(next_token_loss, fullgraph=True, dynamic=False)
            if group.compile
            else next_token_loss
        )
        self.validation = validation

    def rows(self, step: int, micro: int) -> list[int]:
        indices = batch_indices(len(self.tokens), self.group.batch_sequences, self.seed, step)
        return indices[micro * self.micro : (micro + 1) * self.micro]

    def loss(self, model: PreTrainedModel, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        start = int(np.random.default_rng([self.seed, step, micro]).integers(0, self.spare + 1))
        tokens_BS = self.tokens.rows(self.rows(step, micro))[:, start : start + self.length]
        value = self.step_loss(model, tokens_BS.to(self.device))
        return value, {"next_token": value}

    def name_batch(self, step: int, micro: int) -> str:
        return name_rows(self.tokens, self.rows(step, micro))

    @torch.no_grad()
    def validate(self, model: PreTrainedModel) -> dict[str, float]:
        losses = [
            float(next_token_loss(model, torch.tensor([prompt.tokens[: self.length]], device=self.device)))
            for prompt in self.validation
        ]
        return {WATCHED: sum(losses) / len(losses)} if losses else {}


def next_token_loss(model: PreTrainedModel, tokens_BS: Tensor) -> Tensor:
    logits = model(input_ids=tokens_BS[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens_BS[:, 1:].flatten())


def view_in(variant: Variant, budget: Budget) -> View:
    """What a variant's drafter sees of a prefix at a budget."""
    return view_of(variant.policy, budget, variant.sinks, variant.positions)


class MultiView:
    """L = w·L_A + λ·L_C over windows of labelled sequences (paper section 3), and the path term if any.

    Per micro-batch: one no-grad prefill of the sequences, views cut at every window's start, and one forward
    of all windows behind all their views. The prefix KV are detached.
    """

    def __init__(
        self,
        config: Config,
        variant: Variant,
        data: LabelledSequences,
        validation: Sequence[tuple[Prompt, Continuation]],
        device: torch.device,
        path: PathTerm | None = None,
    ) -> None:
        self.config, self.variant, self.data, self.device = config, variant, data, device
        self.path = path
        self.seed = variant.seeds[0] if variant.seeds else config.seed
        self.validation = validation
        self.weights = [1.0]  # of the depths of what is learned
        train = config.train
        self.tokens_per_micro = train.micro_batch_sequences * train.learned_tokens

    def rows(self, step: int, micro: int) -> list[int]:
        train = self.config.train
        indices = batch_indices(len(self.data), train.batch_sequences, self.seed, step)
        return indices[micro * train.micro_batch_sequences : (micro + 1) * train.micro_batch_sequences]

    def loss(self, model: PreTrainedModel, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        train, config, variant = self.config.train, self.config, self.variant
        on_policy = config.labels.on_policy_fraction > 0
        drawn = draw(variant, train, config.data.sequence_tokens, self.seed, step, micro, on_policy)
        views = ([FULL] if variant.full_weight > 0 else []) + [
            view_in(variant, budget) for budget in drawn.budgets
        ]
        found: dict[tuple[View, int], list[Tensor]] = {}  # by view and depth, of all windows
        proposable: list[Tensor] = []
        groups = windows_of(self.data, self.rows(step, micro), drawn, train)
        limit = train.max_logits_mib * 2**20 // len(groups)  # their graphs live until one backward pass
        for windows in groups:
            labels = window_labels(self.data, windows, train.window_tokens, self.device)
            if (tokens_D := draft_tokens(model)) is not None:
                labels = labels.within(tokens_D, model.whole_tokens)
            learned = torch.ones_like(labels.argmax, dtype=torch.bool)
            if windows.learned is not None:
                learned = windows.learned.to(self.device)
            if labels.proposable is not None:
                proposable.append(labels.proposable[learned])
            found_here = self.losses(model, windows, views, labels, learned, limit, drawn.offset)
            for view, depth, losses in found_here:
                found.setdefault((view, depth), []).append(losses)

        full = sparse = torch.zeros((), device=self.device)
        for view in views:
            loss = self.mean([found.get((view, depth), []) for depth in range(len(self.weights))])
            if view is FULL:
                full = loss
            else:
                assert view.budget != "full"
                sparse = sparse + drawn.budgets[view.budget] / variant.num_views * loss
        total = variant.full_weight * full + variant.sparse_weight * sparse
        told = {"total": total, "full": full, "sparse": sparse}
        if self.path is not None:
            told["path"] = self.path_loss(self.path, model, groups, drawn, step, micro)
            told["total"] = total = total + told["path"]
        if proposable:
            told[OUTSIDE] = 1 - torch.cat(proposable).float().mean()
        return total, told

    def losses(
        self,
        model: PreTrainedModel,
        windows: Windows,
        views: Sequence[View],
        labels: TargetLabels,
        learned: Tensor,
        limit: int,
        offset: int,
    ) -> Iterator[tuple[View, int, Tensor]]:
        """By view and depth, of which there is one, the losses of what is learned from in some windows.

        Args:
            limit: bytes of logits that may be made.
            offset: positions by which the sinks are moved back.
        """
        train = self.config.train
        tokens_BS = self.data.tokens.rows(windows.rows).to(self.device)
        guides = self.guides(windows)
        read = (model, tokens_BS, windows.starts, train.window_tokens, views, limit, offset, guides)
        scores_by_view = window_scores(*read)
        for view, scores in zip(views, scores_by_view, strict=True):
            yield view, 0, LOSSES[self.loss_behind(view)](scores, labels)[learned]

    def path_loss(
        self,
        path: PathTerm,
        model: PreTrainedModel,
        groups: Sequence[Windows],
        drawn: Draw,
        step: int,
        micro: int,
    ) -> Tensor:
        """The path term as it adds to the loss: 0 in most steps; behind one of the sampled views if any."""
        if not path.due(step):
            return torch.zeros((), device=self.device)
        rng = path.random(self.seed, step, micro)
        budgets = [budget for budget, times in drawn.budgets.items() for _ in range(times)]
        view = view_in(self.variant, budgets[rng.integers(len(budgets))]) if budgets else FULL
        found = []
        for windows in groups:
            tokens_BS = self.data.tokens.rows(windows.rows).to(self.device)
            shape = path.spec.length, path.spec.paths * len(windows.starts) * len(windows.rows)
            uniforms_TR = torch.from_numpy(rng.random(shape, dtype=np.float32)).to(self.device)
            sampled = self.sample(model, windows, tokens_BS, view, path.rule, uniforms_TR, drawn.offset)
            found.append(path.losses(tokens_BS, windows.starts, *sampled, draft_tokens(model)))
        return path.spec.weight * torch.cat(found).mean()

    def sample(
        self,
        model: PreTrainedModel,
        windows: Windows,
        tokens_BS: Tensor,
        view: View,
        rule: Rule,
        uniforms_TR: Tensor,
        offset: int,
    ) -> tuple[Tensor, Tensor]:
        """Paths from where windows start, and the drafter's logits of them: as `windows.sampled_paths`."""
        read = (model, tokens_BS, windows.starts, view, rule, uniforms_TR, offset)
        return sampled_paths(*read, self.guides(windows))

    def guides(self, windows: Windows) -> Guides:
        """What views of the prefixes of windows are chosen by, where they are chosen so."""
        if self.variant.policy != GUIDED:
            return UNGUIDED
        return window_guides(self.data, windows, self.config.train, self.device)

    def loss_behind(self, view: View) -> str:
        return self.variant.full_loss if view is FULL else self.variant.sparse_loss

    def mean(self, losses: Sequence[Sequence[Tensor]]) -> Tensor:
        """The weighted mean over depths; one that no window reaches counts for nothing."""
        total, weight = torch.zeros((), device=self.device), 0.0
        for share, parts in zip(self.weights, losses, strict=True):
            values = torch.cat(list(parts)) if parts else total.new_zeros(0)
            if len(values):
                total, weight = total + share * values.mean(), weight + share
            else:
                total = total + values.sum()
        return total / weight

    def name_batch(self, step: int, micro: int) -> str:
        return name_rows(self.data.tokens, self.rows(step, micro))

    @torch.no_grad()
    def validate(self, model: PreTrainedModel) -> dict[str, float]:
        """Replayed acceptance on the validation prompts, by budget."""
        budgets = self.config.train.validation_budgets
        views = [view_in(self.variant, budget) for budget in budgets]
        gamma = self.config.train.validation_gamma
        counts: list[list[Counts]] = [[] for _ in budgets]
        for prompt, continuation in self.validation:
            if len(continuation.tokens) < 2:
                continue  # the prefill's token ended the text: nothing was drafted
            tokens_1S = torch.tensor([prompt.tokens], device=self.device)
            S = len(prompt.tokens)
            guides = stored_guide(S, continuation.guide, self.device)
            kept, _ = read_prefix(model, tokens_1S, [(S, view) for view in views], guides=guides)
            logits = replay.view_logits(model, kept, continuation.tokens)
            if not all(replay.finite_views(logits)):
                raise NotFinite(f"validation of {self.variant.name}: logits not finite")
            for match, behind in zip(replay.match_views(logits, continuation.tokens), counts, strict=True):
                ends = continuation.eos_at is not None
                rounds = replay.rounds(match, continuation.tokens, gamma, prompt.max_new_tokens, ends)
                behind.append(Counts.of(rounds, gamma))
        return acceptances(budgets, counts)


def acceptances(budgets: Sequence[Budget], counts: Sequence[Sequence[Counts]]) -> dict[str, float]:
    """Points of the validation curves: acceptance by budget, where something was proposed."""
    return {
        f"validation/acceptance_{'full' if budget == 'full' else f'b{budget}'}": acceptance
        for budget, behind in zip(budgets, counts, strict=True)
        if (acceptance := Counts.pooled(behind).acceptance) is not None
    }
