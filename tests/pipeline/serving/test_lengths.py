"""How long texts a pair takes: what either model cannot read as it should is refused, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import BadData
from pipeline.models.load import ModelRef
from pipeline.serving.pair import Pair, load_pair
from tests.helpers.zoo import plain_model, saved, tiny

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
NEW, GAMMA = 12, 4
# Models that read 64 tokens, or 40 (the zoo's windows), with their role and a part of what is told.
LIMITED: list[tuple[str, dict[str, Any], int, str]] = [
    ("gpt2", {}, 64, "has 64 learned positions and no more"),
    ("opt", {}, 64, "has 64 learned positions and no more"),
    ("mistral", {}, 40, "attends within a sliding window of 40 tokens"),
    ("gemma3_text", {}, 40, "attends within a sliding window of 40 tokens"),
    ("llama", {"rope_parameters": DYNAMIC}, 64, "with rope_type dynamic turns all positions otherwise"),
]
NAMES = [name for name, *_ in LIMITED]


def prompt(tokens: int) -> str:
    return " ".join(f"w{3 + number * 7 % 90}" for number in range(tokens))


def write(pair: Pair, tokens: int) -> list[str]:
    return pair.continue_prompts([prompt(5), prompt(tokens)], "streaming", 16, GAMMA, NEW)


@pytest.fixture
def plain(tmp_path: Path) -> ModelRef:
    return saved(tiny("llama"), tmp_path / "plain", seed=5)


@pytest.mark.parametrize(("name", "changes", "limit", "part"), LIMITED, ids=NAMES)
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_the_last_text_that_fits_and_the_first_that_does_not(
    tmp_path: Path, plain: ModelRef, role: str, name: str, changes: dict[str, Any], limit: int, part: str
) -> None:
    ref = saved(tiny(name, **changes), tmp_path / "limited")
    models = {"target": plain, "drafter": plain} | {role: ref}
    pair = load_pair(**models, device="cpu", max_tokens=limit)  # type: ignore[arg-type]
    write(pair, limit - NEW - GAMMA)
    with pytest.raises(BadData) as caught:
        write(pair, limit - NEW - GAMMA + 1)
    told = str(caught.value)
    assert told.startswith(f"the {role} {part}") and f"max_new_tokens ({NEW}) and γ ({GAMMA})" in told
    assert (
        f"a prompt of {limit - NEW - GAMMA + 1} tokens" in told and f"ask for {limit + 1}: lower one" in told
    )


@pytest.mark.parametrize(("name", "changes", "limit", "part"), LIMITED[:3], ids=NAMES[:3])
def test_texts_up_to_the_limit_are_the_targets_own(
    tmp_path: Path, plain: ModelRef, name: str, changes: dict[str, Any], limit: int, part: str
) -> None:
    config = tiny(name, **changes, eos_token_id=None)
    pair = load_pair(saved(config, tmp_path / "limited"), plain, device="cpu", max_tokens=limit)
    short, long = write(pair, limit - NEW - GAMMA)
    model = plain_model(config)
    for count, text in ((5, short), (limit - NEW - GAMMA, long)):
        tokens = pair.tokenizer(prompt(count), return_tensors="pt")["input_ids"]
        for _ in range(NEW):
            with torch.no_grad():
                best = model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, best], 1)
        assert text == pair.tokenizer.decode(tokens[0, -NEW:], skip_special_tokens=True)


@pytest.mark.parametrize(("name", "changes", "limit", "part"), LIMITED[2:], ids=NAMES[2:])
def test_a_model_that_depends_on_lengths_has_to_be_told_them(
    tmp_path: Path, plain: ModelRef, name: str, changes: dict[str, Any], limit: int, part: str
) -> None:
    ref = saved(tiny(name, **changes), tmp_path / "limited")
    with pytest.raises(BadData, match=f"cannot run the drafter .*{part}") as caught:
        load_pair(plain, ref, device="cpu")
    assert "how long texts get is not said: name that length (`max_tokens` of load_pair" in str(caught.value)
    with pytest.raises(BadData, match=rf"cannot run the target .*{part}.*texts get {limit + 1} tokens long"):
        load_pair(ref, plain, device="cpu", max_tokens=limit + 1)
    load_pair(replace(ref, reach=limit), plain, device="cpu")


def test_other_models_take_any_length(plain: ModelRef) -> None:
    """Beyond the positions that they were trained on, too: that is for their users to judge."""
    pair = load_pair(plain, plain, device="cpu")
    assert not any(pair.limits.values())
    write(pair, 100)


def test_settings_of_the_target_that_are_not_heeded_are_told(
    tmp_path: Path, plain: ModelRef, caplog: pytest.LogCaptureFixture
) -> None:
    ref = saved(tiny("llama"), tmp_path / "target")
    settings = {"eos_token_id": 2, "repetition_penalty": 1.3}
    for folder in (ref.path, plain.path):
        (Path(folder) / "generation_config.json").write_text(json.dumps(settings))
    load_pair(ref, plain, device="cpu")
    (message,) = [record.message for record in caplog.records if record.name.startswith("pipeline.")]
    assert message.startswith(f"{ref.path}: its generation_config asks for repetition_penalty 1.3")
