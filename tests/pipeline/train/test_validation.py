"""The validation curve of a drafter against decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.axes import FULL
from pipeline.kv.views import view_of
from pipeline.store.rows import Continuation, Prompt
from pipeline.train.batches import LabelledSequences
from pipeline.train.objectives import MultiView
from tests.helpers.pairs import make_pair, plain_tokens, rounds_of
from tests.helpers.tiny import tiny_prompts
from tests.helpers.training import CPU, config_for


def continued(prompt: Prompt, tokens: list[int], ends: bool) -> tuple[Prompt, Continuation]:
    """A prompt with the target's continuation, which may end with an EOS."""
    names = prompt.model_dump(include={"prompt_id", "document_id", "dataset", "context", "split"})
    return prompt, Continuation(
        **names, prompt_tokens=len(prompt.tokens), tokens=tokens, gaps=[1.0] * len(tokens),
        eos_at=len(tokens) - 1 if ends else None, text="", repetition_rate=0.0,
    )  # fmt: skip


def test_validation_acceptance_is_that_of_decoding(
    target: PreTrainedModel, drafter: PreTrainedModel, data: LabelledSequences
) -> None:
    """Pooled over three prompts, one of which the target ends by itself."""
    config = config_for(
        {"budgets": {16: 1.0}, "policy": "streaming"}, validation_budgets=[16, "full", 0], validation_gamma=3
    )
    limit, pairs = 20, []
    counts = {"b16": [0, 0], "full": [0, 0], "b0": [0, 0]}
    for number, prompt in enumerate(tiny_prompts("validation", 3, 44, limit)):
        tokens = torch.tensor([prompt.tokens])
        (plain,) = plain_tokens(make_pair(target, drafter, [tokens], FULL, limit), limit)
        eos = frozenset({plain[9]}) if number == 1 else frozenset[int]()
        if eos:
            plain = plain[: plain.index(plain[9]) + 1]
        for name, budget in (("b16", 16), ("full", "full"), ("b0", 0)):
            pair = make_pair(target, drafter, [tokens], view_of("streaming", budget), limit + 3)
            for one in rounds_of(pair, 3, limit, eos)[0]:
                counts[name][0] += one.accepted
                counts[name][1] += one.proposed
        pairs.append(continued(prompt, plain, ends=bool(eos)))
    objective = MultiView(config, config.train.variants[0], data, pairs, CPU)
    found = objective.validate(copy.deepcopy(drafter))
    assert found == {
        f"validation/acceptance_{name}": pytest.approx(accepted / proposed)
        for name, (accepted, proposed) in counts.items()
    }
    assert 0 < found["validation/acceptance_full"] < 1


def test_validation_passes_over_texts_that_end_at_once(
    target: PreTrainedModel, drafter: PreTrainedModel, data: LabelledSequences
) -> None:
    """As an instruct model's do behind a finished document: the prefill's token is an EOS."""
    config = config_for({"budgets": {16: 1.0}}, validation_budgets=[16, "full"], validation_gamma=3)
    prompts = tiny_prompts("validation", 3, 44, 20)

    def validate(*pairs: tuple[Prompt, Continuation]) -> dict[str, float]:
        return MultiView(config, config.train.variants[0], data, pairs, CPU).validate(drafter)

    ended = [continued(prompt, [2], ends=True) for prompt in prompts[:2]]
    (plain,) = plain_tokens(make_pair(target, drafter, [torch.tensor([prompts[2].tokens])], FULL, 20), 20)
    written = continued(prompts[2], plain, ends=False)
    assert validate(*ended) == {}
    assert validate(*ended, written) == validate(written) != {}
