"""`budgetdraft generate`, on the drafters of a finished toy run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.commands.generate import generate
from jobs.stages.pipeline import completed
from pipeline.errors import BadData, ConfigError
from pipeline.models.limits import longest_text
from tests.helpers.documents import story
from tests.helpers.toys import artifact, toy_config


@pytest.mark.parametrize(("drafter", "budget"), [(None, 16), ("full_only", "full")])
def test_generate_prints_the_targets_own_text(
    corpus: Path, finished: Path, capsys: pytest.CaptureFixture[str], drafter: str | None, budget: Any
) -> None:
    prompt = story(3)[:150]
    generate(
        toy_config(corpus, finished), prompt=prompt, drafter=drafter, policy="chunk_topk", budget=budget,
        gamma=3, threshold=0.0, temperature=0.0, max_new_tokens=20, seed=0,
    )  # fmt: skip
    *text, stats = capsys.readouterr().out.rstrip("\n").split("\n")
    folder = artifact(finished, "pretrain-target") / "model"
    target, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = target.generate(given, max_new_tokens=20, do_sample=False)[0, given.shape[1] :]
    assert "\n".join(text) == tokenizer.decode(written, skip_special_tokens=True)
    assert re.fullmatch(
        rf"\[{drafter or 'multi_view'}, chunk_topk budget {budget}, γ 3: acceptance [01]\.\d+, τ [1-4]\.\d+, "
        r"[\d.]+ tokens/s, autoregressive [\d.]+, speedup [\d.]+, same tokens\]",
        stats,
    ), stats


def test_by_a_lossy_rule_it_says_that_the_text_is_not_the_targets(
    corpus: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a last line, with how far from it the text is."""
    settings = {"masks": 8, "dropout": 0.5}
    config = toy_config(
        corpus,
        finished,
        lambda values: values["sweep"].update(rules=["exact", "dropmatch"], dropmatch=settings),
    )
    generate(config, story(3)[:150], None, "chunk_topk", 16, 3, 0.0, 0.0, 20, 0, rule="dropmatch")
    *_, last = capsys.readouterr().out.rstrip("\n").split("\n")
    assert re.fullmatch(
        r"\[dropmatch, lossy: the text is not the target's own: [\d.]+ % of positions hold what "
        r"autoregressive decoding has there, [\d.]+ % of tokens are not the target's arg-max; the target's "
        r"mean log-likelihood a token is -[\d.]+, and of its own text -[\d.]+\]",
        last,
    ), last


WIDE = {"policies": ["window"], "budgets": [64], "sinks": 16, "measure": {"predict": False}}


def test_generate_says_what_is_missing(corpus: Path, finished: Path, tmp_path: Path) -> None:
    def call(storage: Path, drafter: str | None) -> None:
        generate(toy_config(corpus, storage), "Once", drafter, "chunk_topk", 16, 2, 0.3, 0.0, 4, 0)

    with pytest.raises(BadData, match="no drafter 'best'; there are full_only, multi_view"):
        call(finished, "best")
    with pytest.raises(BadData, match="run `budgetdraft run CONFIG` first"):
        call(tmp_path / "empty", None)
    assert not (tmp_path / "empty").exists()
    sinks = toy_config(corpus, finished, lambda values: values["sweep"].update(WIDE))
    with pytest.raises(ConfigError, match=r"sweep\.sinks: a window of 16 with 16 sinks leaves no room"):
        generate(sinks, "Once", None, "window", 16, 2, 0.3, 0.0, 4, 0)


def test_models_know_how_long_the_texts_of_their_config_get(corpus: Path, finished: Path) -> None:
    config = toy_config(corpus, finished)
    trained = completed(config)
    assert {ref.reach for ref in (trained.target, *trained.drafters.values())} == {longest_text(config)}
