"""A trained drafter in the layout that a serving engine loads, with its command line on the card.

What is written follows what vLLM 0.32 reads, of which SGLang reads the same but for windows: there they are
flags of the server. An engine's folder is for that engine; the drafter's own folder stays what it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import BadData
from pipeline.models.draft_vocabulary import FILE as DRAFT_VOCABULARY
from pipeline.models.draft_vocabulary import read_draft_tokens
from pipeline.models.heads.begin import default_layers
from pipeline.models.heads.load import is_head
from pipeline.serving.flags import NAMES, Engine, speculation
from pipeline.store.files import write_text

Layout = Engine | Literal["speculators"]
WEIGHTS = "model.safetensors"
SPECULATORS = "0.9.0"  # whose format it is


def export_for(
    drafter: Path,
    output: Path,
    engine: Layout,
    target_layers: int | None = None,
    window: int | None = None,
    sinks: int = 0,
    target: Path | None = None,
    gamma: int = 3,
) -> str:
    """Write a new folder `output`, whole or not at all; returns the engine's command line.

    The format of speculators is the head's alone, and vLLM loads it.

    Args:
        drafter: a folder that training made.
        target_layers: how many a head's target has; they decide which of them an engine reads by itself.
        window: W, the most entries that the drafter sees; None is all of them.
        sinks: how many of them are the first ones.
        target: the target's folder, which the format of speculators names.
        gamma: proposals a round, for the command line.

    Raises:
        BadData: if the folder holds no drafter, `output` exists, or the engine cannot do what is asked.
    """
    if not (drafter / "config.json").is_file() or not (drafter / WEIGHTS).is_file():
        raise BadData(f"{drafter} holds no drafter: give the model folder of one (config.json, {WEIGHTS})")
    if output.exists():
        raise BadData(f"{output} is there already: name a new folder")
    reader: Engine = "vllm" if engine == "speculators" else engine
    check_window(reader, window, sinks)
    given, head = json.loads((drafter / "config.json").read_text(encoding="utf-8")), is_head(drafter)
    if given.get("kept_positions", "true") != "true":
        raise BadData(
            f"{drafter} was trained with positions: {given['kept_positions']}, which no engine has: the "
            "nearest is anchor_offset, which is served as it is"
        )
    if engine == "speculators" and not head:
        raise BadData("speculators has heads and no draft models: export this one --for vllm")
    config = head_fields(given, reader, target_layers) if head else given
    if window is not None and reader == "vllm":  # a bare `sliding_window` does nothing for a Llama
        layers = ["sliding_attention"] * config["num_hidden_layers"]
        config = config | {"layer_types": layers, "sliding_window": window}
    tensors = head_tensors(drafter, given) if head else {}
    if engine == "speculators":
        config = as_speculators(config, given["feature_layers"], target)
        tensors = {name.replace("midlayer.", "layers.0."): weight for name, weight in tensors.items()}
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if head:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
    else:
        shutil.copytree(drafter, temporary, ignore=shutil.ignore_patterns("README.md"))
    write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
    command = command_line(reader, head, gamma, output, window, sinks)
    write_text(temporary / "README.md", card(engine, drafter, command, window, sinks))
    temporary.rename(output)
    return command


def check_window(engine: Engine, window: int | None, sinks: int) -> None:
    """Raises BadData for a window that the engine does not have; names the nearest that it has."""
    if window is None:
        if sinks:
            raise BadData("--sinks goes with --window: without one a drafter sees everything")
        return
    if not 0 <= sinks < window:
        raise BadData(f"--sinks {sinks}: of a window of {window} they can be 0 to {window - 1}")
    if engine == "vllm" and sinks:
        raise BadData(
            f"vLLM has windows without sinks: the nearest is --window {window} --sinks 0, of a drafter that "
            "was trained and evaluated so; SGLang has both"
        )


def head_fields(given: Mapping[str, Any], engine: Engine, target_layers: int | None) -> dict[str, Any]:
    """The config of a head as engines name its fields.

    Raises:
        BadData: if the head reads layers that the engine numbers in another way or not at all.
    """
    rope = given["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise BadData(
            f"the head turns positions by {rope['rope_type']}, and engines read rope_theta alone of a head: "
            "take a target of plain rotations"
        )
    fields = {
        name: given[name]
        for name in (
            "hidden_size", "target_hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size",
            "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "norm_before_residual",
            "fc_norm", "norm_output", "hidden_act",
        )
    }  # fmt: skip
    fields |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "float32",
    }
    layers = given["feature_layers"]
    if target_layers is not None and layers == default_layers(target_layers):
        return fields
    if target_layers is None:
        raise BadData(
            f"the head reads what layers {layers} read: say --target, the folder of its target, so that it "
            "is known whether these are the layers that an engine takes by itself"
        )
    if engine == "sglang":
        raise BadData(
            f"the head reads what layers {layers} read, and SGLang numbers named layers in another way: "
            f"train it on {default_layers(target_layers)}, which both engines take by themselves"
        )
    if len(layers) != 3 or layers != sorted(set(layers)):
        raise BadData(
            f"the head reads what layers {layers} read, and vLLM takes three different ones, ascending"
        )
    return fields | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": layers}}


def as_speculators(head: Mapping[str, Any], layers: list[int], target: Path | None) -> dict[str, Any]:
    """A head's config in the format of speculators: what is the layer's lies in a config of its own."""
    own = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "fc_norm", "norm_output")
    engines = ("architectures", "eagle_config", "torch_dtype", *own)
    method = {"proposal_type": "greedy", "speculative_tokens": 3}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [method],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None if target is None else str(target), "architectures": []},
        },
        "transformer_layer_config": {name: value for name, value in head.items() if name not in engines},
        "eagle_aux_hidden_state_layer_ids": layers,
        "tie_word_embeddings": False,
        "torch_dtype": head["torch_dtype"],
        **{name: head[name] for name in own},
    }


def head_tensors(drafter: Path, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """A head's weights, which have the engines' names already, and its draft vocabulary as they store it."""
    tensors = {name: weight.contiguous() for name, weight in load_file(drafter / WEIGHTS).items()}
    tokens_V, whole = read_draft_tokens(drafter), given["vocab_size"]
    if tokens_V is None:
        raise BadData(f"{drafter} has no {DRAFT_VOCABULARY}: copy the folder again")
    if len(tokens_V) < whole:
        tensors["d2t"] = tokens_V - torch.arange(len(tokens_V))
        tensors["t2d"] = torch.zeros(whole, dtype=torch.bool).index_fill(0, tokens_V, True)
    return tensors


def command_line(engine: Engine, head: bool, gamma: int, output: Path, window: int | None, sinks: int) -> str:
    """How the engine is started with the target and this folder."""
    program = {
        "vllm": "python -m vllm.entrypoints.openai.api_server --model TARGET",
        "sglang": "python -m sglang.launch_server --model-path TARGET",
    }[engine]
    return f"{program} {speculation(engine, 'head' if head else 'lm', gamma, str(output), window, sinks)}"


def card(engine: Layout, drafter: Path, command: str, window: int | None, sinks: int) -> str:
    name = "speculators" if engine == "speculators" else NAMES[engine]
    seen = "the whole cache" if window is None else f"a window of {window} entries, {sinks} of them the first"
    tokens = read_draft_tokens(drafter)
    size = "" if tokens is None or is_head(drafter) else (
        f"\nIt was trained to propose {len(tokens)} tokens; {name} multiplies its whole head, and may accept "
        "proposals that were never measured.\n"
    )  # fmt: skip
    return f"# A drafter for {name}\n\nBehind {seen}, greedily lossless:\n\n```sh\n{command}\n```\n{size}"
