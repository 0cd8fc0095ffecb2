"""Run by the interpreter that has llama.cpp: greedy texts of a GGUF file behind prompts, as JSON.

Usage: llama_cpp_run.py REQUEST, a JSON file with `gguf`, `prompts` (token ids) and `count`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(request: dict) -> list[list[int]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["gguf"]
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    texts = []
    for prompt in request["prompts"]:
        asked = {"prompt": prompt, "max_tokens": request["count"], "temperature": 0, "repeat_penalty": 1.0}
        reply = server.handle_completions({**asked, "logprobs": 1, "cache_prompt": False})
        texts.append([token["id"] for token in reply["choices"][0]["logprobs"]["content"]])
    return texts


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
