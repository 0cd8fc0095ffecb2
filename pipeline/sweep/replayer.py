"""One drafter replayed on one prompt: every view, control, γ and threshold, without decoding.

The target's greedy continuation gives exact rows; every continuation that it sampled gives estimates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline import metrics
from pipeline.config.sweep import Sweep
from pipeline.decode import replay
from pipeline.decode.model import DecodeModel
from pipeline.decode.sampling import Chance
from pipeline.decode.sources import LookupDrafts
from pipeline.errors import NotFinite
from pipeline.kv.views import PrefixView, View
from pipeline.store.rows import Continuation, FailedCell, Mode, Prompt, PromptRow
from pipeline.sweep.grid import Drafter, DraftLength, ViewCell, draft_lengths, view_cells
from pipeline.sweep.make_rows import make_cell, make_failure, make_row

log = logging.getLogger(__name__)


@dataclass
class PromptReplay:
    """A drafter with a model, twice over the same memory, and its views of the prompts of one file."""

    sweep: Sweep
    drafter: Drafter
    model: PreTrainedModel
    views: PromptViews

    def rows(self, prompt: Prompt, continuations: Sequence[Continuation]) -> Iterator[PromptRow | FailedCell]:
        """All cells of a prompt; one prefill of the drafter serves all its continuations."""
        continuations = [one for one in continuations if len(one.tokens) > 1]
        if not continuations:
            return  # the prefill's token ended the text: there is nothing to draft
        cells, own = view_cells(self.sweep, self.drafter), self.views.of(prompt)
        partner = None
        if any(cell.control == "other_prompt" for cell in cells):
            partner = self.views.partner(prompt)
            if partner is None:  # the other cells do not depend on it
                log.warning(
                    "no other document has a prompt as long as %s: its control other_prompt is left out",
                    prompt.prompt_id,
                )
                cells = [cell for cell in cells if cell.control != "other_prompt"]
        other = own if partner is None else self.views.of(partner)
        kept = [(other if cell.control == "other_prompt" else own)[cell.view] for cell in cells]
        for continuation in continuations:
            yield from self.continuation_rows(prompt, continuation, cells, kept)

    def continuation_rows(
        self, prompt: Prompt, continuation: Continuation, cells: list[ViewCell], kept: list[PrefixView]
    ) -> Iterator[PromptRow | FailedCell]:
        mode, chance = telling(continuation, self.sweep)
        logits_RQV = replay.view_logits(self.model, kept, continuation.tokens)
        finite = replay.finite_views(logits_RQV)
        for length, counts in self.counts(logits_RQV, prompt, continuation):
            for cell, view, good, counted in zip(cells, kept, finite, counts, strict=True):
                if good:
                    yield make_row(
                        mode,
                        make_cell(self.drafter, prompt, cell, length, chance),
                        self.drafter,
                        prompt,
                        counted,
                        continuation.tokens,
                        view.num_bytes,
                        self.sweep.looping_rate,
                    )
        for cell, good in zip(cells, finite, strict=True):
            if not good:
                error = NotFinite("logits not finite in replay")
                yield make_failure(mode, self.sweep, self.drafter, prompt, error, cell)

    def counts(
        self, logits_RQV: torch.Tensor, prompt: Prompt, continuation: Continuation
    ) -> Iterator[tuple[DraftLength, list[metrics.Counts]]]:
        """For every γ and threshold, the counts behind each view. A threshold is for greedy text only."""
        limit, ended, tokens = prompt.max_new_tokens, continuation.eos_at is not None, continuation.tokens
        lengths = draft_lengths(self.sweep, prompt.context, self.drafter)
        if continuation.temperature > 0:
            chances_RQ = replay.chances(logits_RQV, tokens, continuation.log_probs, continuation.temperature)
            for length in lengths:
                if not length.threshold:
                    yield length, replay.expect(chances_RQ, length.gamma, limit, ended)
            return
        matches = replay.match_views(logits_RQV, tokens)
        sure = replay.confidences(logits_RQV) if any(length.threshold for length in lengths) else []
        for length in lengths:
            gamma, counts = length.gamma, []
            for row, match in enumerate(matches):
                stops = [c < length.threshold for c in sure[row]] if length.threshold else None
                counts.append(replay.count(replay.rounds(match, gamma, limit, ended, stops), gamma))
            yield length, counts


def lookup_rows(
    sweep: Sweep, drafter: Drafter, prompt: Prompt, continuation: Continuation, num_tokens: int
) -> Iterator[PromptRow]:
    """Prompt lookup replayed on one continuation. Its proposals are certain, so that the rounds of a sampled
    text are known as those of a greedy one: a proposal is accepted exactly where the text has it."""
    if len(continuation.tokens) < 2:
        return
    (mode, chance), ended = telling(continuation, sweep), continuation.eos_at is not None
    (cell,) = view_cells(sweep, drafter)
    for length in draft_lengths(sweep, prompt.context, drafter):
        source = LookupDrafts([prompt.tokens], prompt.max_new_tokens + length.gamma, num_tokens)
        rounds = replay.source_rounds(source, continuation.tokens, length.gamma, prompt.max_new_tokens, ended)
        yield make_row(
            mode,
            make_cell(drafter, prompt, cell, length, chance),
            drafter,
            prompt,
            replay.count(rounds, length.gamma),
            continuation.tokens,
            0,
            sweep.looping_rate,
        )


def telling(continuation: Continuation, sweep: Sweep) -> tuple[Mode, Chance]:
    """What rows of a continuation are, and their temperature and seed."""
    if continuation.temperature > 0:
        return "estimate", Chance(continuation.temperature, continuation.seed)
    return "replay", Chance(0.0, sweep.seeds[0])


class PromptViews:
    """A drafter's views of the prompts of one file, read when needed; the last two prompts are remembered."""

    def __init__(self, model: DecodeModel, prompts: list[Prompt], views: Sequence[View]) -> None:
        self.model, self.prompts, self.views = model, prompts, list(dict.fromkeys(views))
        self.recent: dict[tuple[str, int], dict[View, PrefixView]] = {}

    def of(self, prompt: Prompt) -> dict[View, PrefixView]:
        key = prompt.prompt_id, len(prompt.tokens)
        if key not in self.recent:
            while len(self.recent) > 1:
                self.recent.pop(next(iter(self.recent)))
            tokens_1S = torch.tensor([prompt.tokens], device=self.model.geometry.device)
            kept, _ = self.model.prefill(tokens_1S, [(len(prompt.tokens), view) for view in self.views])
            self.recent[key] = dict(zip(self.views, kept, strict=True))
        return self.recent[key]

    def partner(self, prompt: Prompt) -> Prompt | None:
        """The next prompt of the file from another document that is as long or longer, cut to this length."""
        at = next(i for i, other in enumerate(self.prompts) if other.prompt_id == prompt.prompt_id)
        for other in [*self.prompts[at + 1 :], *self.prompts[:at]]:
            if other.document_id != prompt.document_id and len(other.tokens) >= len(prompt.tokens):
                return other.model_copy(update={"tokens": other.tokens[: len(prompt.tokens)]})
        return None
