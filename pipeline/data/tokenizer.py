"""The tokenizer that target and drafter share: the target's own, or a new byte-level BPE."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from pipeline.config.models import AnyDrafter, PretrainedModel
from pipeline.config.schema import Config
from pipeline.data.documents import Dropped, Part, read_parts
from pipeline.errors import BadData
from pipeline.store.storage import with_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# Characters that a new BPE is trained on: merges of a few thousand entries settle long before that.
SAMPLE_CHARS = 20_000_000
SAMPLE_FILES = 256


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself begins texts with: BOS, two tokens, or nothing. Many have a BOS unused."""
    whole: list[int] = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(at for at in range(len(whole) + 1) if whole[at : at + len(bare)] == bare)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a prompt that a user gives, for the sweep, `generate` and serving alike.

    Special tokens in it are meant, as in a chat that was rendered before; BOS is put before it once, and no
    EOS behind it.
    """
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    head = beginning(tokenizer)
    return tokens if tokens[: len(head)] == head else head + tokens


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of plain text, without BOS; what looks like a special token in it is text as well."""
    tokens: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    return tokens


def encode_with_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Like `encode`, with the characters [start, end) that each token covers."""
    coded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    offsets = np.asarray(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return coded["input_ids"], offsets[:, 0], offsets[:, 1]


def check_tokenizers(config: Config) -> None:
    """Raises BadData unless the config's target and drafter can share one tokenizer.

    Models in local folders must have logits for all of it; those of the hub are asked when they are loaded.
    """
    if config.data.tokenizer.kind == "bpe":
        for role, model in (("target", config.target), ("drafter", config.drafter)):
            if isinstance(model, PretrainedModel):
                raise BadData(
                    f"data.tokenizer.kind is bpe, but the {role} {model.path!r} is pretrained and "
                    "has its own: set data.tokenizer.kind: target, or make both models scratch"
                )
    elif isinstance(config.target, PretrainedModel):
        from pipeline.models.load import model_ref, shared_tokens

        target = pretrained_tokenizer(config.target, "target")
        if isinstance(config.drafter, PretrainedModel):
            drafter = pretrained_tokenizer(config.drafter, "drafter")
            must_match(target, drafter, config.target.path, config.drafter.path)
        here = [(spec, role) for role, spec in config.models.items() if in_a_folder(spec)]
        shared_tokens(target, *(model_ref(spec, None, role) for spec, role in here))


def in_a_folder(model: AnyDrafter) -> TypeGuard[PretrainedModel]:
    """Whether a model is pretrained, and its config in a local folder."""
    return isinstance(model, PretrainedModel) and (Path(model.path) / "config.json").is_file()


def save_target_tokenizer(config: Config, path: Path) -> None:
    """Copy the target's tokenizer into the folder `path`, unless it is there."""
    assert isinstance(config.target, PretrainedModel)
    if not path.exists():
        _save(pretrained_tokenizer(config.target, "target"), path)


def save_new_tokenizer(config: Config, path: Path, texts: Iterable[str]) -> None:
    """Train a BPE on `texts` into the folder `path`, unless it is there."""
    if not path.exists():
        _save(train_bpe(texts, config.data.tokenizer.vocab_size), path)


def _save(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    temporary.rename(path)


@cache
def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder that one of the two above made; loaded once a process."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer


def pretrained_tokenizer(model: PretrainedModel, role: str) -> PreTrainedTokenizerBase:
    """A pretrained model's fast tokenizer."""
    from transformers import AutoTokenizer

    local = with_home(model.path)
    if not local.exists() and model.path.startswith((".", "~", "/")):
        raise BadData(f"{role}.path: the folder {local} does not exist")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            local if local.exists() else model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise BadData(
            f"{role}.path: no tokenizer can be had from {model.path!r} ({str(error).splitlines()[0]}). Put "
            "its tokenizer files (tokenizer.json, tokenizer_config.json) in a local model folder, or check "
            "the hub id, the network and HF_HUB_OFFLINE"
        ) from error
    if not tokenizer.is_fast:
        raise BadData(f"{role}.path: {model.path!r} has no fast tokenizer: add its tokenizer.json")
    return tokenizer


def must_match(
    target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase, target_path: str, drafter_path: str
) -> None:
    """Raises BadData unless both map the same tokens to the same ids.

    Not compared: embedding sizes, which a model may pad, the pad token, which never enters a prompt, and the
    tokens that begin and end texts, which are the target's.
    """
    from pipeline.models.load import padding

    pads = {padding(target), padding(drafter)}
    ours, theirs = target.get_vocab(), drafter.get_vocab()
    names = (ours.keys() | theirs.keys()) - pads
    different = sorted(name for name in names if ours.get(name) != theirs.get(name))
    problems = [f"{t!r} is {ours.get(t, 'absent')} and {theirs.get(t, 'absent')}" for t in different[:3]]
    if problems:
        raise BadData(
            f"the tokenizers of target {target_path!r} and drafter {drafter_path!r} differ "
            f"({len(different)} tokens; {'; '.join(problems)}): a drafter must share its target's vocabulary"
        )


def sample_text(folder: Path, parts: list[Part], dropped: Dropped) -> Iterator[str]:
    """About SAMPLE_CHARS of the training documents: the start of each, from evenly spaced files."""
    step = -(-len(parts) // SAMPLE_FILES)
    chosen = parts[:: max(step, 1)]
    num_documents = sum(len(part.documents) for part in chosen)
    for document in read_parts(folder, chosen, dropped):
        yield document.text[: max(SAMPLE_CHARS // num_documents, 1000)]


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE with BOS, EOS and pad: any text comes back exactly from its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
