"""Source kind → reader."""

from __future__ import annotations

from typing import Any

from pipeline.config.data import Data
from pipeline.data.documents import Reader
from pipeline.data.sources.conversations import ConversationsReader
from pipeline.data.sources.longbench import LongBenchReader
from pipeline.data.sources.lwm import LwmReader
from pipeline.data.sources.own_prompts import PromptsReader
from pipeline.data.sources.pg19 import Pg19Reader
from pipeline.data.sources.text import TextReader
from pipeline.errors import BadData

READERS: dict[str, type[Reader[Any]]] = {
    "text": TextReader,
    "pg19": Pg19Reader,
    "longbench": LongBenchReader,
    "lwm": LwmReader,
    "prompts": PromptsReader,
    "conversations": ConversationsReader,
}


def make_readers(data: Data, seed: int) -> dict[str, Reader[Any]]:
    """One reader a source, by the source's name, in the config's order.

    Raises:
        BadData: if no source feeds the test split, or a split that another setting needs.
    """
    fed = {split for source in data.sources for split in source.use}
    for split, needed, otherwise in (
        ("test", True, "nothing could be evaluated"),
        ("validation", data.validation_prompts > 0, "set data.validation_prompts: 0"),
        ("train", data.tokenizer.kind == "bpe", "a new tokenizer has nothing to learn from"),
    ):
        if needed and split not in fed:
            raise BadData(f"no source of data.sources has {split!r} in its `use`: add one, or {otherwise}")
    return {source.name: READERS[source.kind](source, data, seed) for source in data.sources}
