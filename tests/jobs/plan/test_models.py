"""Models that cannot be run on a config's texts are told by `plan` before it plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.plan.facts import known
from jobs.plan.report import plan
from pipeline.config.schema import Config
from pipeline.errors import BadData
from tests.helpers.tiny import tiny_config, tiny_tokenizer
from tests.helpers.zoo import tiny

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("falcon", {}, "does not attend through transformers' attention interface"),
    ("gpt_oss", {}, "attention sinks (s_aux)"),
    ("mistral", {}, "a sliding window of 40 tokens, and texts get 96 tokens long"),
    (
        "gpt2",
        {},
        "64 learned positions and no more, and texts get 96 tokens long: lower data.sequence_tokens",
    ),
]


def planned(tmp_path: Path, corpus: Path, name: str, changes: dict[str, Any], role: str) -> Config:
    """A pair of which one model is a Llama; neither has weights."""
    models = {"target": tmp_path / "llama", "drafter": tmp_path / "llama"} | {role: tmp_path / "model"}
    for folder in models.values():
        tiny_tokenizer().save_pretrained(folder)
    tiny(name, **changes).save_pretrained(tmp_path / "model")
    tiny("llama").save_pretrained(tmp_path / "llama")
    return tiny_config(
        {
            "data.sources": [{"kind": "text", "name": "tales", "files": ["*.txt"]}],
            "data.tokenizer": {"kind": "target"},
            "data.root": str(corpus),
            "storage": str(tmp_path / "runs"),
            **{name: {"kind": "pretrained", "path": str(folder)} for name, folder in models.items()},
        }
    )


@pytest.mark.parametrize(("name", "changes", "part"), REFUSED, ids=[name for name, *_ in REFUSED])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_what_cannot_be_run_is_not_planned(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, Any],
    part: str,
    role: str,
) -> None:
    config = planned(tmp_path, corpus, name, changes, role)
    with pytest.raises(BadData) as caught:
        plan(config, as_json=False, memory_gb=None, tflops=1.0)
    told = str(caught.value)
    assert told.startswith(f"cannot run the {role} '{tmp_path / 'model'}': {name}") and part in told
    assert "rope_scaling" not in told + capsys.readouterr().out, "no rotation helps here"
    assert not (tmp_path / "runs").exists()


def test_what_can_be_run_is(corpus: Path, tmp_path: Path) -> None:
    config = planned(tmp_path, corpus, "mistral", {"sliding_window": 96}, "target")
    shapes, _ = known(config)
    assert (shapes["target"].layers, shapes["target"].kv, shapes["target"].vocab) == (2, 24, 97)


def test_a_model_to_be_trained_is_asked_as_well(corpus: Path) -> None:
    """Before the data are looked at: there is no such folder."""
    config = tiny_config(
        {"drafter.rope_scaling": DYNAMIC, "drafter.max_positions": 80, "data.root": str(corpus / "nowhere")}
    )
    with pytest.raises(BadData, match=r"cannot run the drafter: llama with rope_type dynamic .* over 80"):
        known(config)
