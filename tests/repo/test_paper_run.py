"""`conf/paper.yaml` run with tiny models of its kinds, at a sixteenth of the paper's lengths."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.stages.pipeline import completed, run_pipeline
from pipeline.config.files import load_config
from pipeline.config.schema import Config
from pipeline.data.sources.lwm import PAPER_ROWS
from pipeline.errors import BadData
from pipeline.store.files import read_rows
from pipeline.store.rows import CellRow, Continuation, Prompt
from tests.helpers.documents import bench, book, narrative, story, write_lines
from tests.helpers.models import sharpen
from tests.helpers.paths import ROOT

PAPER = ROOT / "conf" / "paper.yaml"
pytestmark = pytest.mark.long  # 80 s for a run of all its cells
# Everything that counts tokens, divided by 16.
SMALL = (
    "data.sequence_tokens=1024", "data.max_sequences=6", "data.max_new_tokens=16", "data.prompts=3",
    "data.validation_prompts=2",
    "data.contexts=[{name: 4K, tokens: 238}, {name: 8K, tokens: 512}, {name: 16K, tokens: 1024}]",
    "train.window_tokens=16", "train.min_prefix_tokens=1008", "train.steps=3", "train.warmup_steps=1",
    "train.validation_budgets=[16, full]",
    "train.variants.single_budget.budgets={64: 1}",
    "train.variants.multi_view.budgets={16: 0.4, 32: 0.3, 64: 0.2, 128: 0.1}",
    "train.variants.multi_view_lambda_1.budgets={16: 0.4, 32: 0.3, 64: 0.2, 128: 0.1}",
    "sweep.budgets=[16, 32, 64, 128, full]", "sweep.gammas=[5, 10]",
    "sweep.measure.budgets=[16, full]", "sweep.measure.gammas=[5]", "sweep.measure.prompts=1",
    "sweep.measure.repeats=1", "report.bootstrap_samples=100",
    "run.executor=inline", "run.device=cpu", "run.gpus_per_task=0", "tracking.enabled=false",
)  # fmt: skip
CONTEXTS = {"4K": 238, "8K": 512, "16K": 1024}
DRAFTER_POSITIONS = 2048 // 16


def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-fallback BPE with Llama-2's special tokens, spaces as ▁ and BOS in front."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=specials, show_progress=False)
    bpe.train_from_iterator(story(1).splitlines(), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def save_model(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A random Llama of this shape under a config.json as the hub has it."""
    torch.manual_seed(seed)
    sharpen(LlamaForCausalLM(LlamaConfig(**config)), 3.0).save_pretrained(folder)
    llama_like_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    text = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config})
    (folder / "config.json").write_text(text)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data as local folders in the hub's schemas."""
    root = tmp_path_factory.mktemp("hub")
    common = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 384}
    save_model(
        root / "yarn",
        common
        | {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "max_position_embeddings": 131072 // 16, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "pretraining_tp": 1, "torch_dtype": "float16",
            "rope_scaling": {
                "factor": 32.0, "original_max_position_embeddings": 4096 // 16, "type": "yarn",
                "finetuned": True,
            },
            "auto_map": {
                "AutoConfig": "configuration_llama.LlamaConfig",
                "AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM",
            },
        },
        seed=1,
    )  # fmt: skip
    for name in ("configuration_llama.py", "modeling_llama_together_yarn.py"):
        (root / "yarn" / name).write_text(f"open({str(root / 'executed')!r}, 'w')\n")
    save_model(
        root / "llama-68m",
        # Its bos and pad are not the tokenizer's, as on the hub.
        common
        | {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": DRAFTER_POSITIONS, "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 1,
        },
        seed=2,
    )  # fmt: skip
    books = [book(100 + k, text=story(100 + k, 150)) for k in range(4)]
    (root / "pg19" / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(books)
    parquet.write_table(table, root / "pg19" / "data" / "train-00000-of-00001.parquet")
    for split, first in (("validation", 110), ("test", 120)):
        rows = [book(first + k, text=story(first + k, 150)) for k in range(3)]
        write_lines(root / "pg19" / "data" / f"{split}-00000-of-00001.jsonl", rows)
    meetings = [bench(130 + k, f"What about {k}?") | {"context": story(130 + k, 150)} for k in range(3)]
    write_lines(root / "longbench" / "qmsum.jsonl", meetings)
    stories = [narrative(140, "other")] * (PAPER_ROWS[-1] + 1)
    for number in PAPER_ROWS:
        stories[number] = narrative(0, f"n{number}")
        stories[number]["document"]["text"] = story(1000 + number, 150)
    write_lines(root / "narrativeqa" / "train.jsonl", stories)
    return root


def small(hub: Path, storage: Path, *overrides: str) -> Config:
    """The paper's config with overrides alone."""
    places = (
        f"storage={storage}", f"data.root={hub}", f"target.path={hub / 'yarn'}",
        f"drafter.path={hub / 'llama-68m'}", "data.sources.pg19.path=./pg19",
        "data.sources.longbench-qmsum.path=./longbench", "data.sources.lwm.path=./narrativeqa",
    )  # fmt: skip
    return load_config(PAPER, [*places, *SMALL, *overrides])


@pytest.fixture(scope="module")
def summary_file(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # float32, because only there is speculation held to AR token for token: in half precision a verify pass
    # over several tokens may round otherwise than one token at a time.
    return run_pipeline(small(hub, tmp_path_factory.mktemp("runs"), "target.dtype=float32"))


DATASETS = ("pg19", "longbench-qmsum", "lwm")
DRAFTERS = ("untrained", "full_only", "single_budget", "multi_view", "multi_view_lambda_1")
BUDGETS = (16, 32, 64, 128, "full")


def test_every_cell_is_there(summary_file: Path) -> None:
    summary = json.loads(summary_file.read_text())
    rows = {}
    for row in summary["acceptance"]:
        cell, view = row["cell"], row["cell"]["view"]
        axes = (
            cell["drafter"],
            cell["dataset"],
            cell["context"],
            view["budget"],
            view["control"],
            cell["gamma"],
        )
        rows[axes] = row["num_prompts"]
    assert rows == {
        (drafter, dataset, context, budget, control, gamma): 3
        for drafter in DRAFTERS
        for dataset in DATASETS
        for context in CONTEXTS
        for gamma in (5, 10)
        for budget, control in [
            *((budget, control) for budget in BUDGETS for control in (None, "other_prompt")),
            (0, "no_prefix"),
        ]
    }
    timed = [row["cell"] for row in summary["speedup"]]
    measured = {(c["drafter"], c["dataset"], c["context"], c["view"]["budget"]) for c in timed}
    named = {("multi_view", d, c, b) for d in DATASETS for c in CONTEXTS for b in (16, "full")}
    assert named <= measured  # and what predictions point at
    assert summary["lossless"] == {"prompts": 9, "exact": 9, "explained": 0, "left_out_tokens": 0}
    assert [stage["name"] for stage in summary["stages"]] == [
        "prepare", "pretrain", "teach", "train", "sweep", "report",
    ]  # fmt: skip


def test_cells_know_the_range_that_their_drafter_was_trained_on(summary_file: Path) -> None:
    cells = read_rows(summary_file.parent / "cells.jsonl", CellRow)
    for cell in cells:
        positions = DRAFTER_POSITIONS if cell.cell.drafter == "untrained" else 1024
        assert cell.in_trained_range == (CONTEXTS[cell.cell.context] + 16 <= positions), cell
    assert {c.cell.context for c in cells if not c.in_trained_range and c.cell.drafter == "multi_view"} == {
        "16K"
    }


def test_prompts_are_of_the_papers_form(summary_file: Path) -> None:
    (prepared,) = summary_file.parent.parent.glob("prepare-*")
    tokenizer = llama_like_tokenizer()
    for dataset in DATASETS:
        for context, length in CONTEXTS.items():
            prompts = read_rows(prepared / "prompts" / f"test-{dataset}-{context}.jsonl", Prompt)
            assert {len(p.tokens) for p in prompts} == {length}
            assert {p.tokens[0] for p in prompts} == {tokenizer.bos_token_id}
            assert len({p.document_id for p in prompts}) == 3
    sources = json.loads((prepared / "manifest.json").read_text())["counts"]["sources"]
    assert sources["lwm"]["prompt_rows"] == "the paper's 20" and sources["lwm"]["prompt_split"] == "train"
    assert {source["from"] for source in sources.values()} == {"local files"}


def test_the_target_is_scaled_by_yarn_and_no_remote_code_runs(hub: Path, summary_file: Path) -> None:
    """The stored continuation is what transformers' own generation gives with the folder's config."""
    assert not (hub / "executed").exists()
    model = AutoModelForCausalLM.from_pretrained(hub / "yarn", dtype=torch.float32)
    assert model.model.rotary_emb.rope_type == "yarn" and model.model.rotary_emb.attention_scaling > 1.3
    (taught,) = summary_file.parent.parent.glob("teach-*")
    (prepared,) = summary_file.parent.parent.glob("prepare-*")
    prompt = read_rows(prepared / "prompts" / "test-pg19-16K.jsonl", Prompt)[0]
    row = read_rows(taught / "continuations" / "test-pg19-16K.jsonl", Continuation)[0]
    vocabulary = len(llama_like_tokenizer())
    tokens = list(prompt.tokens)
    for token in row.tokens:
        logits = model(torch.tensor([tokens])).logits[0, -1, :vocabulary]
        assert int(logits.argmax()) == token
        tokens.append(token)
    assert not (hub / "executed").exists()


def test_trained_drafters_are_what_their_variants_say(summary_file: Path) -> None:
    """The untrained one is the hub's, the others are not, and each has moved in its own way."""
    storage = summary_file.parent.parent
    weights = {}
    for name in DRAFTERS:
        (folder,) = (f for f in storage.glob("drafter-*") if f.name.rpartition("-")[0] == f"drafter-{name}")
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        weights[name] = model.lm_head.weight.detach()
        if name != "untrained":
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            assert last["step"] == 3 and (last["loss/sparse"] > 0) == (name != "full_only")
    pairs = [(a, b) for a in DRAFTERS for b in DRAFTERS if a < b]
    assert all(not torch.equal(weights[a], weights[b]) for a, b in pairs)


def test_local_models_are_known_by_their_files_wherever_the_run_starts(
    hub: Path, summary_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hub)
    overrides = ("target.dtype=float32", "target.path=./yarn", "drafter.path=./llama-68m")
    config = small(hub, summary_file.parent.parent, *overrides)
    assert set(completed(config).drafters) == set(DRAFTERS)
    for folder, undone in (("llama-68m", "training of untrained, full_only"), ("yarn", "teach is not done")):
        weights = hub / folder / "model.safetensors"
        stat = weights.stat()
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
        with pytest.raises(BadData, match=undone):
            completed(config)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert completed(config)


def test_half_precision_target_runs_on_a_cpu(hub: Path, tmp_path: Path) -> None:
    config = small(
        hub, tmp_path, "data.contexts=[{name: 4K, tokens: 238}]", "data.prompts=2", "sweep.gammas=[5]",
        "sweep.drafters=[multi_view]", "sweep.budgets=[16]", "sweep.measure.budgets=[16]",
        "sweep.controls=[]",
    )  # fmt: skip
    assert config.target.dtype == "float16"
    cells = read_rows(run_pipeline(config).parent / "cells.jsonl", CellRow)
    measured = [cell for cell in cells if cell.mode == "measure"]
    assert {cell.cell.dataset for cell in measured} == set(DATASETS)
    # Two bytes a number: K and V, 2 layers of 4 heads of 16, 238 tokens.
    assert all(cell.target_kv_bytes == 2 * 2 * 2 * 4 * 16 * 238 for cell in measured)
