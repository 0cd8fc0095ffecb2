"""One drafter replayed on one prompt: every view, control, γ and threshold, without decoding.

The target's greedy continuation gives exact rows; every continuation that it sampled gives estimates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.axes import FULL, NOTHING, Place, View
from pipeline.config.sweep import Sweep
from pipeline.decode import replay
from pipeline.decode.chain_replay import ChainMatch, tell_chains
from pipeline.decode.feature_head import LeanHead
from pipeline.decode.model import DecodeModel
from pipeline.decode.sampling import Chance
from pipeline.decode.sources import SOURCES
from pipeline.errors import BadData, NotFinite
from pipeline.kv.guides import are_guided, stored_guide
from pipeline.kv.positions import frequencies_of
from pipeline.kv.views import PrefixView
from pipeline.metrics import Counts, Round
from pipeline.models.heads.eagle import FeatureHead
from pipeline.store.layout import shares_file
from pipeline.store.rows import Continuation, FailedCell, Mode, Prompt, PromptRow
from pipeline.sweep.grid import Drafter, can_replay, cells_behind, views_of
from pipeline.sweep.make_rows import all_cells, at_chance, make_failure, make_row

log = logging.getLogger(__name__)

Again = Callable[[int], list[Round]]
REMEMBERED = 2  # prompts of which a drafter's views are held


@dataclass
class PromptReplay:
    """A drafter with a model, and its views of the prompts of one file.

    What a cascade proposes is what its middle would without a drafter, so the middle is replayed; of the view
    of its drafter, `inner`, the size is all that counts.
    """

    sweep: Sweep
    drafter: Drafter
    model: PreTrainedModel
    views: PromptViews
    inner: PromptViews | None = None

    def rows(self, prompt: Prompt, continuations: Sequence[Continuation]) -> Iterator[PromptRow | FailedCell]:
        """All cells of a prompt; one prefill of the drafter serves all its continuations."""
        continuations = [continuation for continuation in continuations if len(continuation.tokens) > 1]
        if not continuations:
            return  # the prefill's token ended the text: there is nothing to draft
        views, of_prompt = views_of(self.sweep, self.drafter), self.views.of(prompt)
        # Before another prompt is read: the target's view of this one is then at hand.
        features = [self.views.features(prompt, continuation) for continuation in continuations]
        partner = None
        if any(view.control == "other_prompt" for view in views):
            partner = self.views.partner(prompt)
            if partner is None:  # the other cells do not depend on it
                log.warning(
                    "no other document has a prompt as long as %s: its control other_prompt is left out",
                    prompt.prompt_id,
                )
                views = [view for view in views if view.control != "other_prompt"]
        of_partner = of_prompt if partner is None else self.views.of(partner, by=prompt)
        sources = [of_partner if view.control == "other_prompt" else of_prompt for view in views]
        kept = [source[view.kept] for source, view in zip(sources, views, strict=True)]
        wholes = [source[FULL] if view.refresh else None for source, view in zip(sources, views, strict=True)]
        for continuation, read in zip(continuations, features, strict=True):
            told = self.tell(continuation, kept, read)
            again = [
                None if whole is None else self.again(prompt, continuation, first, whole, read)
                for first, whole in zip(kept, wholes, strict=True)
            ]
            held = [whole.num_bytes if whole else 0 for whole in wholes]
            yield from self.continuation_rows(prompt, continuation, views, kept, told, again, held)

    def again(
        self,
        prompt: Prompt,
        continuation: Continuation,
        first: PrefixView,
        whole: PrefixView,
        features_QF: torch.Tensor | None,
    ) -> Again:
        """The rounds of every γ behind entries that are chosen again."""
        model, tokens, ended = self.model, continuation.tokens, continuation.eos_at is not None
        shares_QC, head = self.views.shares(prompt), isinstance(model, FeatureHead)
        frequencies = model.rotary.inv_freq if head else frequencies_of(model)
        deepest = max(self.sweep.gammas_of(continuation.context))

        def rounds(gamma: int) -> list[Round]:
            match: replay.Match
            if isinstance(model, FeatureHead):
                assert features_QF is not None
                match = ChainMatch(model, tokens, features_QF, deepest)
            else:
                match = replay.ModelMatch(model, first, tokens)
            of_text = tokens, gamma, prompt.max_new_tokens, ended
            return replay.refreshed_rounds(match, first, whole, shares_QC, frequencies, *of_text)

        return rounds

    def tell(
        self, continuation: Continuation, kept: list[PrefixView], features_QF: torch.Tensor | None
    ) -> replay.Told:
        """What the drafter would have proposed along a continuation, behind every view."""
        tokens, log_probs = continuation.tokens, continuation.log_probs
        temperature, surely = continuation.temperature, any(self.sweep.thresholds)
        if isinstance(self.model, FeatureHead):
            assert features_QF is not None
            deepest = max(self.sweep.gammas_of(continuation.context))
            of_text = (tokens, features_QF, deepest, temperature, log_probs, surely)
            return tell_chains(self.model, kept, *of_text)
        logits_RQV = replay.view_logits(self.model, kept, tokens)
        return replay.tell(logits_RQV, tokens, temperature, log_probs, surely)

    def continuation_rows(
        self,
        prompt: Prompt,
        continuation: Continuation,
        views: list[View],
        kept: list[PrefixView],
        told: replay.Told,
        again: Sequence[Again | None],
        held: Sequence[int],
    ) -> Iterator[PromptRow | FailedCell]:
        """Rows of a continuation.

        Args:
            again: of each view, its rounds where its entries are chosen again.
            held: bytes that are held for that.
        """
        mode, chance = telling(continuation, self.sweep)
        finite = told.finite
        inner_bytes = 0
        if self.inner is not None:
            inner_bytes = sum(view.num_bytes for view in self.inner.of(prompt).values())
        place = Place(prompt.dataset, prompt.context)
        behind = [cells_behind(self.sweep, self.drafter, place, view) for view in views]
        # A column holds the cells of one γ and threshold behind every view.
        columns = [cells for cells in zip(*behind, strict=True) if can_replay(cells[0], chance)]
        lengths = [(cells[0].gamma, cells[0].threshold) for cells in columns]
        counts = self.counts(told, prompt, continuation, lengths, again)
        sizes = [view.num_bytes + more for view, more in zip(kept, held, strict=True)]
        for cells, counted in zip(columns, counts, strict=True):
            for cell, size, good, cell_counts in zip(cells, sizes, finite, counted, strict=True):
                if good:
                    yield make_row(
                        mode,
                        at_chance(cell, chance),
                        self.drafter,
                        prompt,
                        cell_counts,
                        continuation.tokens,
                        size + inner_bytes,
                        self.sweep.looping_rate,
                    )
        for seen, good in zip(views, finite, strict=True):
            if not good:
                cell = at_chance(all_cells(self.sweep, self.drafter, prompt, seen), chance)
                yield make_failure(mode, cell, prompt, NotFinite("logits not finite in replay"))

    def counts(
        self,
        told: replay.Told,
        prompt: Prompt,
        continuation: Continuation,
        lengths: Sequence[tuple[int, float]],
        again: Sequence[Again | None],
    ) -> Iterator[list[Counts]]:
        """For every γ and threshold, the counts behind each view."""
        limit, ended, tokens = prompt.max_new_tokens, continuation.eos_at is not None, continuation.tokens
        if told.chances is not None:
            for gamma, _ in lengths:
                yield replay.expect(told.chances, gamma, limit, ended)
            return
        for gamma, threshold in lengths:
            counts = []
            for row, match in enumerate(told.match):
                stops = (np.asarray(told.sure[row]) < threshold).tolist() if threshold else None
                if (refreshed := again[row]) is not None:
                    rounds = refreshed(gamma)
                else:
                    rounds = replay.rounds(match, tokens, gamma, limit, ended, stops)
                counts.append(Counts.of(rounds, gamma))
            yield counts


def lookup_rows(
    sweep: Sweep, drafter: Drafter, prompt: Prompt, continuation: Continuation, num_tokens: int
) -> Iterator[PromptRow]:
    """A source without a model replayed on one continuation.

    Its proposals are certain, so the rounds of a sampled text are known exactly, as those of a greedy one: a
    proposal is accepted where the text has it, and nowhere else.
    """
    if len(continuation.tokens) < 2:
        return
    (mode, chance), ended = telling(continuation, sweep), continuation.eos_at is not None
    for cell in cells_behind(sweep, drafter, Place(prompt.dataset, prompt.context), NOTHING):
        room = prompt.max_new_tokens + cell.gamma
        source = SOURCES[drafter.name]([prompt.tokens], room, num_tokens)
        rounds = replay.source_rounds(source, continuation.tokens, cell.gamma, prompt.max_new_tokens, ended)
        yield make_row(
            mode,
            at_chance(cell, chance),
            drafter,
            prompt,
            Counts.of(rounds, cell.gamma),
            continuation.tokens,
            0,
            sweep.looping_rate,
        )


def telling(continuation: Continuation, sweep: Sweep) -> tuple[Mode, Chance]:
    """The mode of a continuation's rows, and their temperature and seed."""
    if continuation.temperature > 0:
        return "estimate", Chance(continuation.temperature, continuation.seed)
    return "replay", Chance(0.0, sweep.seeds[0])


class PromptViews:
    """A drafter's views of the prompts of one file, read when needed; the last prompts are remembered.

    `guides` are the target's rankings of the prompts' chunks, empty where no view is chosen by them. `folder`
    is stage teach's, for views that are chosen again.
    """

    def __init__(
        self,
        model: DecodeModel,
        prompts: list[Prompt],
        views: Sequence[View],
        guides: Sequence[Sequence[int]] = (),
        folder: Path | None = None,
    ) -> None:
        self.model, self.prompts, self.views = (
            model,
            prompts,
            list(dict.fromkeys(view.kept for view in views)),
        )
        if any(view.refresh for view in self.views):
            self.views = list(dict.fromkeys([*self.views, FULL]))
        self.folder = folder
        self.guides: dict[str, Sequence[int]] = {}
        if are_guided(self.views):
            ids = [prompt.prompt_id for prompt in prompts]
            self.guides = {name: guide for name, guide in zip(ids, guides, strict=True) if guide}
        self.recent: dict[tuple[str, int, str], dict[View, PrefixView]] = {}

    def of(self, prompt: Prompt, by: Prompt | None = None) -> dict[View, PrefixView]:
        """What the views keep of a prompt, chosen by its own guide, or by that of another of its length."""
        guide = self.guides.get((by or prompt).prompt_id)
        key = prompt.prompt_id, len(prompt.tokens), (by or prompt).prompt_id if guide else ""
        if key not in self.recent:
            while len(self.recent) >= REMEMBERED:
                self.recent.pop(next(iter(self.recent)))
            tokens_1S = torch.tensor([prompt.tokens], device=self.model.geometry.device)
            S = len(prompt.tokens)
            guides = stored_guide(S, guide or (), tokens_1S.device)
            kept, _ = self.model.prefill(tokens_1S, [(S, view) for view in self.views], guides)
            self.recent[key] = dict(zip(self.views, kept, strict=True))
        return self.recent[key]

    def shares(self, prompt: Prompt) -> torch.Tensor:
        """[Q, C] of the prompt's chunks in what the target attends to at each token of its text."""
        assert self.folder is not None
        file = shares_file(self.folder, prompt.prompt_id)
        if not file.exists():
            raise BadData(f"{file} is missing, which sweep.refresh asks for: run stage teach anew")
        return torch.from_numpy(np.load(file)).to(self.model.geometry.device)

    def features(self, prompt: Prompt, continuation: Continuation) -> torch.Tensor | None:
        """[Q, F] what a head reads along a continuation of a prompt; None for other drafters."""
        if not isinstance(self.model, LeanHead):
            return None
        tokens_1S = torch.tensor([prompt.tokens], device=self.model.geometry.device)
        return self.model.reader.text_features(tokens_1S, continuation.tokens)

    def partner(self, prompt: Prompt) -> Prompt | None:
        """The next prompt of the file from another document that is as long or longer, cut to this length.

        One that begins with this prompt is passed over: what is left of it is the same text.
        """
        at = next(i for i, other in enumerate(self.prompts) if other.prompt_id == prompt.prompt_id)
        length = len(prompt.tokens)
        for other in [*self.prompts[at + 1 :], *self.prompts[:at]]:
            tokens = other.tokens[:length]
            if other.document_id != prompt.document_id and len(tokens) == length and tokens != prompt.tokens:
                return other.model_copy(update={"tokens": tokens})
        return None
