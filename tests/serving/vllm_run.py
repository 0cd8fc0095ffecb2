"""Run by the interpreter that has vLLM: greedy texts of prompts, and what speculation counted, as JSON.

Usage: vllm_run.py REQUEST, a JSON file with `target`, `prompts` (token ids), `max_tokens`,
`speculative` and `engine`, which holds more of the engine's arguments.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


def main(request: dict) -> dict:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=request["target"],
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        max_num_seqs=1,
        max_model_len=2048,
        enable_prefix_caching=False,
        speculative_config=request["speculative"],
        **request["engine"],
    )
    asked = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], asked)
    counters = {
        metric.name: getattr(metric, "values", getattr(metric, "value", None))
        for metric in engine.get_metrics()
        if "spec_decode" in metric.name
    }
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "counters": counters}


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
