"""The models of a config, asked before any work whether they can be run on its texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from pydantic import ValidationError
from transformers import PretrainedConfig

from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.models.check import beyond_positions, check_models, check_role
from pipeline.models.weights import WEIGHTS
from tests.helpers.configs import SCRATCH
from tests.helpers.tiny import VOCABULARY, tiny_config
from tests.helpers.zoo import saved, tiny

# Texts of 96 tokens (MINIMAL), while the zoo's models are built for 64 positions.
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0}


def pretrained(folder: Path, config: PretrainedConfig, **values: Any) -> dict[str, Any]:
    saved(config, folder)
    return {"kind": "pretrained", "path": str(folder), **values}


def refused(config: Config) -> str:
    with pytest.raises(BadData) as caught:
        check_models(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [("falcon", "attention interface"), ("gpt2", "64 learned positions"), ("gemma2", "softcap")],
)
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_role_path_and_reason_are_named(tmp_path: Path, role: str, name: str, part: str) -> None:
    spec = pretrained(tmp_path / "model", tiny(name))
    told = refused(tiny_config({role: spec}))
    assert told.startswith(f"cannot run the {role} '{tmp_path / 'model'}': {name}") and part in told


def test_longer_windows_than_texts_are_fine(tmp_path: Path) -> None:
    """Sequences of 96 tokens; prompts of 64, 16 new tokens and γ = 4 are shorter."""
    for window in (96, 95):
        spec = pretrained(tmp_path / str(window), tiny("mistral", sliding_window=window))
        config = tiny_config({"target": spec})
        if window == 96:
            check_models(config)
        else:
            assert "a sliding window of 95 tokens, and texts get 96 tokens long" in refused(config)
    longer = tiny_config({"target": pretrained(tmp_path / "96", tiny("mistral", sliding_window=96)),
                          "data.max_new_tokens": 30})  # fmt: skip
    assert "texts get 98 tokens long" in refused(longer)


def test_rotations_of_models_to_be_trained() -> None:
    """Built for 80 positions; a drafter as each variant has it."""
    spec = SCRATCH | {"max_positions": 80}
    check_models(tiny_config({"target": spec, "drafter": spec}))
    told = refused(tiny_config({"target": spec | {"rope_scaling": DYNAMIC}}))
    assert told.startswith("cannot run the target: llama with rope_type dynamic") and "over 80 tokens" in told
    check_models(tiny_config({"target": SCRATCH | {"rope_scaling": DYNAMIC}}))  # for 256 positions

    variants = [{"name": "a", "sparse_weight": 0}, {"name": "b", "sparse_weight": 0, "rope_scaling": DYNAMIC}]
    told = refused(tiny_config({"drafter": spec, "train.variants": variants}))
    assert told.startswith("cannot run the drafter with train.variants.b.rope_scaling: llama with rope_type")
    # Where every variant brings another, the drafter's own is never run.
    for variant in variants:
        variant["rope_scaling"] = YARN
    check_models(tiny_config({"drafter": spec | {"rope_scaling": DYNAMIC}, "train.variants": variants}))


def test_rotations_of_pretrained_models(tmp_path: Path) -> None:
    spec = pretrained(tmp_path / "llama", tiny("llama"))
    check_models(tiny_config({"drafter": spec}))
    assert "rope_type dynamic" in refused(tiny_config({"drafter": spec | {"rope_scaling": DYNAMIC}}))
    variants = [{"name": "b", "sparse_weight": 0, "rope_scaling": DYNAMIC}]
    told = refused(tiny_config({"drafter": spec, "train.variants": variants}))
    assert told.startswith(
        f"cannot run the drafter with train.variants.b.rope_scaling '{tmp_path / 'llama'}'"
    )


@pytest.mark.parametrize(
    ("name", "words"), [("gpt2", "no rotary positions"), ("gemma3_text", "for each type of")]
)
def test_rope_scaling_that_cannot_act(tmp_path: Path, name: str, words: str) -> None:
    config = tiny(name, max_position_embeddings=128, **({"sliding_window": 128} if name != "gpt2" else {}))
    spec = pretrained(tmp_path / "model", config)
    check_models(tiny_config({"target": spec}))
    told = refused(tiny_config({"target": spec | {"rope_scaling": YARN}}))
    assert (
        words in told and "rope_scaling cannot act: leave it out" in told and str(tmp_path / "model") in told
    )


def test_entries_are_moved_in_models_that_rotate_whole_keys(tmp_path: Path) -> None:
    variants = [{"name": "b", "positions": "rebased", "budgets": {16: 1}}]
    for name, refuses in (("gpt_neox", True), ("qwen3", False)):
        spec = pretrained(tmp_path / name, tiny(name, max_position_embeddings=128))
        config = tiny_config({"drafter": spec, "train.variants": variants})
        if refuses:
            told = refused(config)
            assert "train.variants.b.positions: rebased is for llama, " in told and "is a gpt_neox" in told
        else:
            check_models(config)


def test_a_rebased_drafter_that_is_not_trained_is_swept_rebased(tmp_path: Path) -> None:
    spec = pretrained(
        tmp_path / "model", tiny("llama", max_position_embeddings=128, kept_positions="rebased")
    )
    variant = {"name": "b", "budgets": {16: 1}}
    told = refused(tiny_config({"drafter": spec, "train.variants": [variant | {"steps": 0}]}))
    assert "train.variants.b.positions: true is not how" in told and "set positions: rebased" in told
    for fine in ({"steps": 0, "positions": "rebased"}, {"steps": 3}):
        check_models(tiny_config({"drafter": spec, "train.variants": [variant | fine]}))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model_type": "unheard_of"}, "cannot read the config of the target"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised (awq)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ({"num_attention_heads": 5}, "the target"),
        ({"intermediate_size": 128}, "do not fit its config.json"),
    ],
)
def test_configs_that_cannot_be_used(tmp_path: Path, values: dict[str, Any], part: str) -> None:
    spec = pretrained(tmp_path / "model", tiny("llama"))
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    told = refused(tiny_config({"target": spec}))
    assert part in told and str(tmp_path / "model") in told and len(told) < 600


def test_weights_are_looked_at_if_wanted(tmp_path: Path) -> None:
    config = tiny_config({"target": pretrained(tmp_path / "model", tiny("llama"))})
    (tmp_path / "model" / WEIGHTS).write_bytes(b"torn")
    assert "is not a whole safetensors file" in refused(config)
    check_role(config, "target", weights=False)


def test_models_of_the_hub_are_asked_where_their_config_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched, and weights that are not here yet are not missed."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("pipeline.models.hub.snapshot_download", None)
    config = tiny_config({"target": {"kind": "pretrained", "path": "people/falcon"}})
    check_models(config)
    snapshot = tmp_path / "hub/models--people--falcon/snapshots/c0ffee"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs/main").write_text("c0ffee")
    saved(tiny("falcon"), tmp_path / "made")
    snapshot.mkdir(parents=True)
    shutil.copyfile(tmp_path / "made/config.json", snapshot / "config.json")
    assert refused(config).startswith("cannot run the target 'people/falcon': falcon does not attend")
    saved(tiny("llama"), tmp_path / "other")
    shutil.copyfile(tmp_path / "other/config.json", snapshot / "config.json")
    check_models(config)


@pytest.mark.parametrize("kind", ["pretrained", "first_layers"])
def test_a_draft_vocabulary_of_everything_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    model = pretrained(tmp_path / "model", tiny("llama"))
    models = {"target": model, "data.tokenizer": {"kind": "target"}}
    models["drafter"] = model if kind == "pretrained" else {"kind": "first_layers", "layers": [0]}
    check_models(tiny_config({**models, "train.draft_vocabulary": VOCABULARY - 1}))
    told = refused(tiny_config({**models, "train.draft_vocabulary": VOCABULARY}))
    assert told.startswith(f"train.draft_vocabulary: {VOCABULARY} must be less than the {VOCABULARY} tokens")


def test_nor_is_one_of_a_tokenizer_that_is_made_here() -> None:
    with pytest.raises(ValidationError, match=r"train.draft_vocabulary \(300\) must be less than"):
        tiny_config({"train.draft_vocabulary": 300})
    with pytest.raises(ValidationError, match=r"train.draft_vocabulary \(20\) must be at least twice"):
        tiny_config({"train.draft_vocabulary": 20, "labels.top_k": 11})


def test_fields_beyond_the_positions_of_a_model_are_named(tmp_path: Path) -> None:
    """Of a model in a folder by its own config; one whose RoPE is scaled is meant for more."""
    tiny("llama", max_position_embeddings=80).save_pretrained(tmp_path / "model")
    spec = {"kind": "pretrained", "path": str(tmp_path / "model")}
    contexts = [{"name": "48", "tokens": 48}, {"name": "72", "tokens": 72}]
    changes = {"drafter": spec | {"rope_scaling": YARN}, "data.contexts": contexts}
    assert beyond_positions(tiny_config({**changes, "target": spec})) == [
        "target is built for 80 positions, and data.sequence_tokens (96), data.contexts.72.tokens + "
        "data.max_new_tokens (88) ask for more: lower them, or set target.rope_scaling"
    ]
    assert beyond_positions(tiny_config({**changes, "target.max_positions": 95}))[0].startswith("target is")
    absent = {"target": {"kind": "pretrained", "path": "nobody/nothing-here"}, "drafter": {"kind": "head"}}
    assert beyond_positions(tiny_config({**changes, "target.max_positions": 96})) == []
    assert beyond_positions(tiny_config(absent)) == [], "what is not here is not known"
