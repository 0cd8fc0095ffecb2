"""The flags by which vLLM and SGLang serve a cell of the sweep, or what they lack for it.

vLLM's were run with 0.32; SGLang's are from the documentation of 0.5.21.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pipeline.axes import Cell
from pipeline.decode.sources import LONGEST_MATCH
from pipeline.kv.policies import WINDOW

Engine = Literal["vllm", "sglang"]
NAMES: dict[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang"}


def speculation(
    engine: Engine, kind: str, gamma: int, folder: str, window: int | None = None, sinks: int = 0
) -> str:
    """The flags with which an engine speculates.

    Args:
        kind: of the drafter: a head, prompt lookup, or any other for a draft model.
        folder: what `export_for` wrote; it holds vLLM's window.
    """
    if engine == "sglang":
        if kind == "prompt_lookup":
            return f"--speculative-algorithm NGRAM --speculative-num-draft-tokens {gamma + 1}"
        flags = (
            f"--speculative-algorithm {'EAGLE3' if kind == 'head' else 'STANDALONE'} "
            f"--speculative-draft-model-path {folder} --speculative-num-steps {gamma} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {gamma + 1}"
        )
        if window is None:
            return flags
        return f"{flags} --speculative-draft-window-size {window} --speculative-draft-sink-size {sinks}"
    method: dict[str, Any] = {"method": "eagle3" if kind == "head" else "draft_model", "model": folder}
    if kind == "prompt_lookup":
        method = {"method": "ngram", "prompt_lookup_max": LONGEST_MATCH, "prompt_lookup_min": 1}
    # With the manager a windowed draft model was seen to change the target's text; a windowed head was not.
    switch = " --disable-hybrid-kv-cache-manager" if window and kind not in ("head", "prompt_lookup") else ""
    return f"--speculative-config '{json.dumps({**method, 'num_speculative_tokens': gamma})}'{switch}"


def lacks(engine: Engine, cell: Cell) -> str:
    """Why an engine cannot serve a cell; "" where it can."""
    name = NAMES[engine]
    if cell.drafter == "self_speculation":
        return f"{name} has no target that drafts for itself behind a budget"
    if cell.lossy:
        return f"{name} does not accept by {cell.rule}"
    if cell.drafter == "cascade":
        return f"{name} has no drafter that drafts for a middle model"
    if cell.threshold:
        return f"{name} drafts γ tokens in every round"
    if cell.drafter == "prompt_lookup" or cell.budget == "full":
        return ""
    if cell.policy != WINDOW:
        return f"{name} has windows and the full cache, and no {cell.policy}"
    if engine == "vllm" and cell.view.sinks:
        return "vLLM has windows without sinks"
    return ""


def of_cell(engine: Engine, cell: Cell, folder: str) -> str:
    """The flags of a cell that the engine does not lack anything for."""
    window = None if cell.budget == "full" or cell.drafter == "prompt_lookup" else cell.budget
    return speculation(engine, cell.kind, cell.gamma, folder, window, cell.view.sinks or 0)
