"""An OpenAI-compatible server as the engine that writes greedy texts in a target's place.

Prompts go as token ids, many at once, so that no template and no tokenizer stands between. Texts come back
as token ids where the server gives them, else as text, which counts if the target's tokenizer reads as many
tokens in it and spells them so again. Whether they are the target's, `train/target/labelling.py` says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from pipeline.config.train import TextServer
from pipeline.errors import BadData, Incomplete
from pipeline.serving.client import Refused, Reply, Server
from pipeline.train.target.labelling import Text

log = logging.getLogger(__name__)


class ServedTexts:
    """An `Engine` of `train/target/labelling.py`, asked for the first time when there is something to write.

    Args:
        eos: the tokens that end texts of the target.
        num_tokens: those that the target knows.
    """

    def __init__(
        self, asked: TextServer, tokenizer: PreTrainedTokenizerBase, eos: frozenset[int], num_tokens: int
    ) -> None:
        self.asked, self.tokenizer, self.eos, self.num_tokens = asked, tokenizer, eos, num_tokens
        self.least_agreement = asked.least_agreement
        self.field, self.said = "labels.server", f"tokens that {asked.url} wrote"
        self.advice = (
            "Serve the very weights of the target, in their precision, not quantised, from an engine that "
            "gives token ids (vLLM from 0.10 on)"
        )

    @cached_property
    def server(self) -> Server:
        asked = self.asked
        return Server(asked.url, asked.model, asked.timeout_s, asked.requests_at_once)

    def write(
        self, prompts: Mapping[str, Sequence[int]], count: int, ends: bool, copies: int = 1
    ) -> dict[str, list[Text] | None]:
        """As `Engine.write`. The first error ends it: requests that have not begun are never sent."""
        assert copies == 1, "greedy texts are all alike"
        server = self.server

        def written(name: str) -> list[Text] | None:
            try:
                reply = server.complete(prompts[name], count, 0 if ends else count)
                tokens = self.tokens_of(reply, count, ends)
                return None if tokens is None else [Text(tokens, tokens)]
            except Incomplete as error:
                raise Incomplete(
                    f"labels.server, prompt {name}: {error}; the same command goes on"
                ) from error
            except BadData as error:
                raise BadData(f"labels.server, prompt {name}: {error}") from error

        with ThreadPoolExecutor(self.asked.requests_at_once) as pool:
            texts = dict(zip(prompts, pool.map(written, prompts), strict=True))
        log.info("%s wrote %d texts", server.url, len(texts))
        return texts

    def tokens_of(self, reply: Reply, count: int, ends: bool) -> list[int] | None:
        """A text up to its EOS, that included; None where it cannot be read, or ends elsewhere.

        Raises:
            Refused: if a token is none of the target's, or there are more than were asked for.
        """
        tokens = self.read_back(reply) if reply.tokens is None else reply.tokens
        if tokens is None:
            return None
        if max(tokens, default=0) >= self.num_tokens or len(tokens) > count:
            raise Refused(
                f"{self.asked.url} answers with {len(tokens)} tokens up to id {max(tokens)}; {count} were "
                f"asked for, and the target has {self.num_tokens} ids: is it another model?"
            )
        end = next((at for at, token in enumerate(tokens) if token in self.eos), None)
        if not ends:
            return tokens if end is None and len(tokens) == count else None
        if end is not None:
            return tokens[: end + 1]
        if reply.ended and len(self.eos) == 1 and len(tokens) < count:
            return [*tokens, *self.eos]  # which some servers do not give
        return tokens if len(tokens) == count else None

    def read_back(self, reply: Reply) -> list[int] | None:
        """The tokens of a text without ids; None where they are not as many, or spell something else."""
        tokens: list[int] = self.tokenizer.encode(reply.text, add_special_tokens=False)
        as_many = len(tokens) in (reply.num_tokens, reply.num_tokens - reply.ended)
        return tokens if as_many and self.tokenizer.decode(tokens) == reply.text else None
