"""Load, build and export targets and drafters: Hugging Face causal language models over our attention."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

from pipeline.errors import BadData
from pipeline.kv.view_cache import ATTENTION, WHOLE
from pipeline.models.build import prepare_model
from pipeline.models.draft_vocabulary import read_draft_tokens, restrict
from pipeline.models.hub import model_files, model_folder
from pipeline.models.layers import keep_layers, name_layers, problem_of_layers
from pipeline.models.limits import rotations
from pipeline.models.support import problem_of, problem_of_loaded, short
from pipeline.models.weights import check_weights, must_be_whole, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config.models import FirstLayers, PretrainedModel, ScratchModel

# A bar for every shard of every load would drown our own progress.
disable_progress_bar()


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one.

    Raises:
        ValueError: if a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but torch sees no GPU; set run.device: auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@dataclass(frozen=True)
class ModelRef:
    """Where a model comes from and how it is to be loaded; small enough to travel to workers.

    `rope_scaling` replaces the model's rope parameters (YaRN, linear, …, as transformers names them).
    `trained_positions` is set where the model's own config does not tell. `role` is for messages. `reach` is
    the length in tokens of the longest text that it will see; a model whose attention or rotation depends on
    it is refused where it is not known. `files` are those that the results are to be of (`hub.model_files`).
    With `layers` the model is left with these of its layers (see `models.layers`). A model that `proposes` is
    held to the draft vocabulary that lies beside its weights, if there is one; others have their whole head.
    """

    path: str
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    rope_scaling: dict[str, Any] | None = None
    trained_positions: int | None = None
    role: str = "model"
    reach: int | None = None
    files: dict[str, tuple[int, int]] | None = None
    layers: tuple[int, ...] | None = None
    proposes: bool = False


def model_ref(
    spec: PretrainedModel | ScratchModel,
    scratch_folder: Path | None,
    role: str = "model",
    reach: int | None = None,
) -> ModelRef:
    """The reference of a config's model; a scratch model lives where stage pretrain put it."""
    if spec.kind == "scratch":
        return ModelRef(path=str(scratch_folder), dtype=spec.dtype, role=role, reach=reach)
    return ModelRef(
        spec.path,
        spec.dtype,
        spec.revision,
        spec.trust_remote_code,
        spec.rope_scaling,
        spec.trained_positions,
        role,
        reach,
        model_files(Path(spec.path)) or None,
    )


def layers_ref(target: ModelRef, spec: FirstLayers) -> ModelRef:
    """The reference of a drafter that is made of the target's layers."""
    return replace(target, dtype=spec.dtype or target.dtype, role="drafter", layers=spec.layers)


def load_model(
    ref: ModelRef, num_tokens: int, device: torch.device | str = "cpu", dtype: str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, with the attention that reads view caches.

    Args:
        num_tokens: entries of the tokenizer that target and drafter share. Logits beyond it, where a
            model pads its vocabulary, are cut off.
        dtype: overrides the reference's.

    Raises:
        BadData: if the checkpoint cannot be read whole, is of a kind that cannot be run here (see
            `models.support`), lacks weights, or has fewer logits than the tokenizer has tokens.
    """
    path, folder = ref.path, model_folder(ref)
    weight_files(ref, folder)  # first: a hub's model without files has no folder to read a config from
    config = check_model(ref, folder)
    check_weights(ref, folder, config)
    if config.vocab_size < num_tokens:
        raise BadData(
            f"the {ref.role} {path!r} has {config.vocab_size} logits, but the tokenizer has {num_tokens} "
            "tokens: target and drafter must share one tokenizer"
        )
    quiet = ExitStack()
    if ref.layers is not None and ref.layers == tuple(range(len(ref.layers))):
        name_layers(config, ref.layers)  # the others are not read, which transformers would list
        quiet.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype or ref.dtype),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=ref.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a loader raises for what is in the files
        raise BadData(f"cannot load the weights of the {ref.role} {path!r}: {short(error)}") from error
    finally:
        quiet.close()
    must_be_whole(model, told["missing_keys"], f"the {ref.role} {path!r}")
    must_be_unchanged(ref, folder)
    if ref.layers is not None and model.config.num_hidden_layers != len(ref.layers):
        model = keep_layers(model, ref.layers)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, WHOLE, True)  # by `problem_of`, no text reaches a window
    model = prepare_model(model, num_tokens).to(device)
    if problem := problem_of_loaded(model):
        raise BadData(f"cannot run the {ref.role} {path!r}: {problem}")
    tokens_D = read_draft_tokens(folder) if ref.proposes else None
    return model if tokens_D is None else restrict(model, tokens_D)


def shared_tokens(tokenizer: PreTrainedTokenizerBase, *refs: ModelRef) -> int:
    """How many first tokens of a tokenizer all of these models have logits for.

    The pad token may lie behind them, as it never enters a text: many were added to a tokenizer alone.

    Raises:
        BadData: if a token that may enter a text has no logit; names it.
    """
    least, pad = len(tokenizer), padding(tokenizer)
    for ref in refs:
        least = min(least, size := read_config(ref).get_text_config(decoder=True).vocab_size)
        beyond = {token: at for token, at in tokenizer.get_vocab().items() if at >= size and token != pad}
        if beyond:
            names = ", ".join(sorted(beyond, key=beyond.__getitem__)[:4])
            raise BadData(
                f"the {ref.role} {ref.path!r} has {size} logits, and none for {len(beyond)} of the "
                f"tokenizer's tokens, such as {names}: target and drafter must share one tokenizer, and a "
                "model must have embeddings for all of it"
            )
    return least


def padding(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The pad token of a tokenizer, unless it is another special token as well, and so may enter a text."""
    others = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    return None if tokenizer.pad_token in others else tokenizer.pad_token


def check_model(ref: ModelRef, folder: Path | None = None) -> PretrainedConfig:
    """A model's config, if models of it can be run here.

    Args:
        folder: of its config.json, where it is known already.

    Raises:
        BadData: if not; names the role, the path, what it is and what to do.
    """
    config = read_config(ref, folder)
    problem = problem_of_layers(config, ref.layers) if ref.layers is not None else None
    if problem := problem or problem_of(config, ref.reach, ref.trust_remote_code):
        raise BadData(f"cannot run the {ref.role} {ref.path!r}: {problem}")
    return config


def read_config(ref: ModelRef, folder: Path | None = None) -> PretrainedConfig:
    """A model's config, with the reference's rope parameters; `folder` as of `check_model`.

    Raises:
        BadData: if it cannot be had or read, or has no use for rope parameters; names the role and the path.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder or model_folder(ref), trust_remote_code=ref.trust_remote_code
        )
    except BadData:
        raise
    except Exception as error:  # whatever the code of a config raises for what is in the file
        raise BadData(f"cannot read the config of the {ref.role} {ref.path!r}: {short(error)}") from error
    if ref.rope_scaling is not None:
        own: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        if rotations(config) != [own]:
            kinds = "no rotary positions" if not own else "a rotation for each type of layer"
            raise BadData(
                f"the {ref.role} {ref.path!r} is a {config.model_type} and has {kinds}, so that rope_scaling "
                "cannot act: leave it out"
            )
        config.rope_parameters = {**own, **ref.rope_scaling}
    return config


def must_be_unchanged(ref: ModelRef, folder: Path) -> None:
    """Raises BadData where a model's files are not those that the run began with."""
    if ref.files is None or (now := model_files(folder)) == ref.files:
        return
    names = sorted(name for name in now.keys() | ref.files.keys() if now.get(name) != ref.files.get(name))
    raise BadData(
        f"the {ref.role} {ref.path!r} was changed while this run used it ({', '.join(names[:4])}): nothing "
        "was computed with the new files; run the same command again when they stay as they are"
    )


def own_positions(ref: ModelRef) -> int:
    """Positions that a pretrained model was trained on, by the config's word or else the model's.

    Raises:
        BadData: if neither says so.
    """
    if ref.trained_positions is not None:
        return ref.trained_positions
    positions = getattr(read_config(ref), "max_position_embeddings", None)
    if positions is None:
        raise BadData(
            f"the {ref.role} {ref.path!r} does not say for how many positions it was trained: set "
            "trained_positions beside its path"
        )
    return int(positions)
