"""The objective of a head: chains behind the full view and the sampled sparse ones.

Training-time test: every token of a window begins a chain, whose further slots are fed what the head itself
gave. So at each depth the head learns to go on from its own outputs, as it will have to while it drafts.
Between depths the weights fall. Everything else is as in `objectives.py`: the same labels for every view.

Shape legend: W windows, B rows, C tokens of a window, T depth of chains, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.axes import View
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.decode import replay
from pipeline.decode.sampling import Rule
from pipeline.errors import NotFinite
from pipeline.kv.guides import stored_guide
from pipeline.metrics import Counts
from pipeline.store.rows import Continuation, Prompt
from pipeline.train.batches import LabelledSequences, Windows
from pipeline.train.losses import LOSSES, States, TargetLabels
from pipeline.train.objectives import MultiView, acceptances, view_in
from pipeline.train.paths import PathTerm
from pipeline.train.target.features import Features


class ChainedViews(MultiView):
    """L = w·L_A + λ·L_C, each the weighted mean over the depths of chains."""

    def __init__(
        self,
        config: Config,
        variant: Variant,
        data: LabelledSequences,
        validation: Sequence[tuple[Prompt, Continuation]],
        device: torch.device,
        features: Features,
        path: PathTerm | None = None,
    ) -> None:
        super().__init__(config, variant, data, validation, device, path)
        self.features = features
        decay = config.train.chain_decay or 0.8
        self.weights = [decay**at for at in range(config.chain_steps)]

    def losses(
        self,
        model: Any,
        windows: Windows,
        views: Sequence[View],
        labels: TargetLabels,
        learned: Tensor,
        limit: int,
        offset: int,
    ) -> Iterator[tuple[View, int, Tensor]]:
        """A chain at depth d that began at token t of its window is about the label of token t + d."""
        C, head = self.config.train.window_tokens, getattr(model, "module", model)
        tokens_BL = self.data.tokens.rows(windows.rows).to(self.device)
        features_BLF = self.features.of_rows(windows.rows, tokens_BL)
        parts = len(windows.starts) * len(windows.rows)
        count = 4 * parts * C * len(views) * len(self.weights) * head.num_tokens
        sharded = hasattr(head.lm_head.weight, "ds_id")  # by ZeRO-3: whole inside a forward pass only
        whole = sharded or count <= limit
        depth = len(self.weights)
        read = (tokens_BL, features_BLF, windows.starts, C, views, depth, whole, offset)
        outputs = model(*read, guides=self.guides(windows))
        place = torch.arange(parts * C, device=self.device)
        for depth, output in enumerate(outputs):
            # An answer may have fewer labels than chains are deep. What is learned from is then empty, and
            # stays in the graph: every worker's backward pass has the same parts, which ZeRO-3 counts on.
            begun = place[(place % C + depth < C) & learned.roll(-depth)]
            there = labels.take(begun + depth)
            for view, of_view in zip(views, output.chunk(len(views)), strict=True):
                flat = of_view.flatten(0, 1)[begun]
                scores = flat if whole else States(flat, head.lm_head.weight)
                name = self.loss_behind(view)
                yield view, depth, LOSSES[name](scores, there) if len(begun) else flat.sum(-1)

    def sample(
        self,
        model: Any,
        windows: Windows,
        tokens_BS: Tensor,
        view: View,
        rule: Rule,
        uniforms_TR: Tensor,
        offset: int,
    ) -> tuple[Tensor, Tensor]:
        """Chains that read what they sampled: one forward pass samples them and has their gradients."""
        T, starts = len(uniforms_TR), windows.starts
        num_paths = uniforms_TR.shape[1] // (len(starts) * len(windows.rows))
        tokens_D, chosen = getattr(model, "module", model).lm_head.tokens, list[Tensor]()

        def choose(logits_R1D: Tensor) -> Tensor:
            chosen.append(rule.choose(logits_R1D[:, -1].detach(), uniforms_TR[len(chosen)])[0])
            return tokens_D[chosen[-1]].unsqueeze(1)

        features_BSF = self.features.of_rows(windows.rows, tokens_BS)
        views = [view] * num_paths
        read = (tokens_BS, features_BSF, starts, 1, views, T, True, offset, choose)
        outputs = model(*read, self.guides(windows))
        choose(outputs[-1])
        return torch.stack(chosen, 1), torch.cat(outputs, 1)

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """Replayed acceptance on the validation prompts, by budget."""
        budgets, gamma = self.config.train.validation_budgets, self.config.train.validation_gamma
        views = [view_in(self.variant, budget) for budget in budgets]
        head = getattr(model, "module", model)
        counts: list[list[Counts]] = [[] for _ in budgets]
        for number, (prompt, continuation) in enumerate(self.validation):
            if len(continuation.tokens) < 2:
                continue  # the prefill's token ended the text: nothing was drafted
            text, start, count = continuation.tokens, len(prompt.tokens), len(continuation.tokens) - 1
            tokens_1S = torch.tensor([prompt.tokens + text[:-1]], device=self.device)
            features = self.features.of_text(number, tokens_1S)
            guides = stored_guide(start, continuation.guide, self.device)
            outputs = model(tokens_1S, features, [start], count, views, gamma, True, guides=guides)
            if not all(torch.isfinite(output).all() for output in outputs):
                raise NotFinite(f"validation of {self.variant.name}: logits not finite")
            proposed = torch.stack(
                [head.lm_head.tokens[output.argmax(-1)] for output in outputs], -1
            ).tolist()
            ends = continuation.eos_at is not None
            for chains, behind in zip(proposed, counts, strict=True):
                match = [
                    [t + at + 1 <= count and token == text[t + at + 1] for at, token in enumerate(chain)]
                    for t, chain in enumerate(chains)
                ]
                rounds = replay.rounds(match, text, gamma, prompt.max_new_tokens, ends)
                behind.append(Counts.of(rounds, gamma))
        return acceptances(budgets, counts)
