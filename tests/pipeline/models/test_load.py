"""Loading, building and exporting models, against plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from pipeline.config.models import PretrainedModel, ScratchModel
from pipeline.config.train import Labels
from pipeline.decode.replay import match_views, view_logits
from pipeline.decode.sampling import Sampler
from pipeline.errors import BadData
from pipeline.kv.view_cache import read_prefix
from pipeline.kv.views import view_of
from pipeline.models.build import build_scratch
from pipeline.models.export import export_model
from pipeline.models.load import ModelRef, load_model, model_ref, own_positions, pick_device
from pipeline.train.target.labelling import label_sequences
from tests.helpers import zoo
from tests.helpers.pairs import make_pair, plain_tokens, rounds_of
from tests.helpers.tiny import VOCABULARY, numbers, save_model, tiny_config, tiny_tokenizer

TOKENS = torch.from_numpy(numbers(2, 60, seed=8).astype(np.int64))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel) -> ModelRef:
    return save_model(target, tmp_path_factory.mktemp("models") / "target")


@torch.no_grad()
def plain_logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(TOKENS).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        {"rope_theta": 500.0},
    ],
    ids=["linear", "yarn", "theta"],
)
def test_rope_scaling_acts_and_is_exported(saved: ModelRef, tmp_path: Path, scaling: dict[str, Any]) -> None:
    """The oracle is the same folder with `config.json` edited by hand."""
    edited = shutil.copytree(saved.path, tmp_path / "edited")
    values = json.loads((edited / "config.json").read_text())
    values["rope_parameters"] |= scaling
    (edited / "config.json").write_text(json.dumps(values))

    scaled = load_model(ModelRef(saved.path, rope_scaling=scaling), VOCABULARY)
    ours = scaled(input_ids=TOKENS).logits
    torch.testing.assert_close(ours, plain_logits(edited), atol=1e-3, rtol=1e-3)
    assert (ours - plain_logits(Path(saved.path))).abs().max() > 0.1

    export_model(scaled, tiny_tokenizer(), tmp_path / "exported")
    torch.testing.assert_close(plain_logits(tmp_path / "exported"), ours, atol=1e-3, rtol=1e-3)
    again = load_model(ModelRef(str(tmp_path / "exported")), VOCABULARY)
    torch.testing.assert_close(again(input_ids=TOKENS).logits, ours, atol=0, rtol=0)


@torch.no_grad()
def test_a_scratch_model_with_yarn_survives_its_export(tmp_path: Path) -> None:
    spec = tiny_config({"target.rope_scaling": {"rope_type": "yarn", "factor": 2.0}}).target
    assert isinstance(spec, ScratchModel)
    model = build_scratch(spec, tiny_tokenizer(), seed=3)
    save_model(model, tmp_path / "yarn")
    torch.testing.assert_close(
        plain_logits(tmp_path / "yarn"), model(input_ids=TOKENS).logits, atol=1e-5, rtol=1e-4
    )


def test_scratch_models_depend_on_their_seed_alone() -> None:
    spec = tiny_config().target
    assert isinstance(spec, ScratchModel)
    before = torch.get_rng_state()
    one, same, other = (build_scratch(spec, tiny_tokenizer(), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are left alone"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert len(one["model.embed_tokens.weight"]) == VOCABULARY


# ── vocabularies ──────────────────────────────────────────────────────────────────────────────────


def padded(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """The model with more logits than tokens; the additional ones win wherever they are looked at."""
    config = type(model.config)(
        **{**model.config.to_dict(), "vocab_size": size, "tie_word_embeddings": False}
    )
    twin = LlamaForCausalLM(config)
    state = {**model.state_dict()}
    rows = state["model.embed_tokens.weight"]
    extra = 9.0 * rows[:1].sign().expand(size - len(rows), -1) + torch.rand(size - len(rows), rows.shape[1])
    state["model.embed_tokens.weight"] = torch.cat([rows, 0 * extra])
    state["lm_head.weight"] = torch.cat([rows, 50 * extra])
    twin.load_state_dict(state)
    return twin


@torch.no_grad()
def test_a_padded_vocabulary_decodes_as_without_padding(
    target: PreTrainedModel, drafter: PreTrainedModel, tmp_path: Path
) -> None:
    refs = {
        "target": (save_model(target, tmp_path / "t"), save_model(padded(target, 128), tmp_path / "pt")),
        "drafter": (save_model(drafter, tmp_path / "d"), save_model(padded(drafter, 104), tmp_path / "pd")),
    }
    assert int(plain_logits(tmp_path / "pt").argmax(-1).max()) >= VOCABULARY, "the padding would be chosen"
    results = []
    for number in (0, 1):
        large, small = (load_model(refs[name][number], VOCABULARY) for name in ("target", "drafter"))
        text = []
        (kept,), logits = read_prefix(small, TOKENS[:1], [(60, view_of("streaming", 24))])
        assert logits.shape[-1] == VOCABULARY
        pair = make_pair(large, small, [TOKENS[:1]], view_of("streaming", 24), 24)
        for temperature in (0.0, 1.3):
            (plain,) = plain_tokens(pair, 20, sampler=Sampler.seeded(temperature, [5]))
            (rounds,) = rounds_of(pair, 4, 20, sampler=Sampler.seeded(temperature, [5]))
            text += [plain, rounds]
        text.append(match_views(view_logits(small, [kept], text[0]), text[0])[0])
        labels = label_sequences(large, TOKENS.numpy(), Labels(top_k=4))
        results.append((text, labels))
    (text, labels), (padded_text, padded_labels) = results
    assert text == padded_text
    for name in ("argmax", "ids"):
        np.testing.assert_array_equal(labels[name], padded_labels[name])
    np.testing.assert_allclose(labels["log_probs"], padded_labels["log_probs"], rtol=2e-3, atol=1e-3)


def test_fewer_logits_than_tokens_is_bad_data(saved: ModelRef) -> None:
    with pytest.raises(BadData, match=r"has 97 logits, but the tokenizer has 98 tokens.*share one tokenizer"):
        load_model(saved, VOCABULARY + 1)


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_model_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="nowhere"):
        load_model(ModelRef(str(tmp_path / "nowhere")), VOCABULARY)


def test_trained_positions_come_from_the_config_or_the_model(saved: ModelRef) -> None:
    assert own_positions(saved) == 512
    assert own_positions(ModelRef(saved.path, trained_positions=40)) == 40


def test_positions_that_nobody_says_are_bad_data(tmp_path: Path) -> None:
    ref = zoo.saved(zoo.tiny("bloom"), tmp_path / "bloom", role="drafter")
    file = tmp_path / "bloom" / "config.json"
    values = json.loads(file.read_text())
    values.pop("max_position_embeddings", None)
    file.write_text(json.dumps(values))
    with pytest.raises(BadData, match=r"the drafter .*bloom' does not say .* set trained_positions"):
        own_positions(ref)
    (tmp_path / "bloom" / "config.json").write_text("{")
    with pytest.raises(BadData, match=r"cannot read the config of the drafter .*bloom'"):
        own_positions(ref)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"run\.device"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")


def test_references_carry_what_the_config_says() -> None:
    spec = PretrainedModel(
        kind="pretrained", path="a/b", revision="c0ffee", dtype="bfloat16", trained_positions=7
    )
    ref = model_ref(spec, None)
    assert (ref.path, ref.revision, ref.dtype, ref.trained_positions) == ("a/b", "c0ffee", "bfloat16", 7)
    assert not ref.trust_remote_code
    scratch = tiny_config().target
    assert model_ref(scratch, Path("made")) == ModelRef("made")


def test_the_dtype_is_the_references_unless_overridden(saved: ModelRef) -> None:
    ref = ModelRef(saved.path, dtype="bfloat16")
    assert load_model(ref, VOCABULARY).dtype == torch.bfloat16
    assert load_model(ref, VOCABULARY, dtype="float32").dtype == torch.float32
