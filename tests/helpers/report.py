"""A small sweep made by hand: prompt rows with known counts, and the artifacts around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.results.axes import Axes
from pipeline.store.artifacts import Artifact, open_artifact
from pipeline.store.files import write_rows
from pipeline.store.rows import Continuation, FailedCell, PromptRow
from tests.helpers.configs import MINIMAL
from tests.helpers.rows import make

AXES = Axes(
    drafters=("full_only", "multi_view"),
    datasets=("code",),
    contexts={"64": 64},
    gamma=4,
    smallest_budget=16,
    trained_without_prefix=(),
    max_new_tokens=16,
    least_documents=5,
)


def row(
    drafter: str = "full_only", prompt: int = 0, accepted: int = 5, proposed: int | None = 10, **changes: Any
) -> PromptRow:
    """A replayed prompt of γ = 4 at B = 16 whose rounds all get one position far."""
    values: dict[str, Any] = {
        "drafter": drafter, "dataset": "code", "context": "64", "policy": "chunk_topk", "budget": 16,
        "gamma": 4, "mode": "replay",
        "prompt_id": f"p{prompt}", "document_id": f"d{prompt // 2}", "num_tokens": 12, "num_rounds": 6,
        "num_proposed": proposed, "num_accepted": accepted, "reached": (6, 3, 0, 0), "kept": (3, 1, 0, 0),
        "repetition_rate": 0.1, "looping": False, "in_trained_range": True, "drafter_kv_bytes": 2048,
    }  # fmt: skip
    return make(PromptRow, **{**values, **changes})


def measured(drafter: str = "full_only", prompt: int = 0, **changes: Any) -> PromptRow:
    """A measured prompt, exact, that decodes 12 tokens in about 2 s against 3 s of AR."""
    times: dict[str, Any] = {
        "mode": "measure", "exact": True, "prefill_s": 1.5, "ar_prefill_s": 1.0, "decode_s": [2.0, 2.0],
        "ar_decode_s": [3.0, 3.0], "ar_num_tokens": 12, "target_kv_bytes": 65536, "peak_memory_bytes": 10**6,
    }  # fmt: skip
    return row(drafter, prompt, **{**times, **changes})


def sweep_rows() -> list[PromptRow]:
    """12 prompts: multi_view accepts 60 % at B = 16 and full_only 40 %; at the full cache 50 % and 51 %.

    Prompts 10 and 11 loop and are drafted nearly perfectly by both. The control takes 30 points from
    multi_view and nothing from full_only. Two prompts are measured.
    """
    share = {
        ("full_only", 16): 40, ("full_only", "full"): 51, ("multi_view", 16): 60, ("multi_view", "full"): 50,
    }  # fmt: skip
    rows = []
    for (drafter, budget), accepted in share.items():
        for prompt in range(12):
            looping = prompt >= 10
            wobble = 3 if prompt % 2 else -3
            for control in (None, "other_prompt"):
                lost = 30 if control and drafter == "multi_view" else 0
                kept = 95 if looping else accepted + wobble - lost
                for gamma in (2, 4):
                    place = {"budget": budget, "control": control, "gamma": gamma, "looping": looping}
                    rows.append(row(drafter, prompt, kept, 100, **place))
        for prompt in (0, 1):
            kept = accepted + (3 if prompt % 2 else -3)
            rows += [measured(drafter, prompt, num_accepted=kept, num_proposed=100, budget=budget)]
    return rows


def config(storage: Path, **groups: Any) -> Config:
    return Config.model_validate({**MINIMAL, "storage": str(storage), **groups})


def local_source(kind: str, path: str) -> dict[str, Any]:
    """What stage prepare notes of a source that is one local file."""
    return {"kind": kind, "from": "local files", "num_files": 1, "bytes": 5000, "files": [{"path": path}]}


def artifacts(
    storage: Path, rows: list[PromptRow], failed: list[FailedCell], text: str = "def f(): pass"
) -> tuple[Artifact, Artifact, Artifact]:
    """Prepare, teach and sweep folders as the stages leave them, as far as the report reads them."""
    prepare = open_artifact(storage, "prepare", {})
    prepare.finish({}, {"sources": {"code": local_source("text", "a.py")}}, 1.0)
    teach = open_artifact(storage, "teach", {})
    texts = [
        Continuation(
            prompt_id=f"p{i}", document_id=f"d{i}", dataset="code", context="64", split="test",
            prompt_tokens=64,
            tokens=[1, 2], gaps=[1.0, 1.0], eos_at=None, text=f"{text} {i}", repetition_rate=i / 10,
        )
        for i in range(9)
    ]  # fmt: skip
    write_rows(teach.path / "continuations" / "test-code-64.jsonl", texts)
    sweep = open_artifact(storage, "sweep", {})
    write_rows(sweep.path / "rows" / "all.jsonl", rows)
    if failed:
        write_rows(sweep.path / "failed" / "all.jsonl", failed)
    else:
        sweep.finish({"device": "cpu"}, {"rows": len(rows)}, 1.0)
    return prepare, teach, sweep
