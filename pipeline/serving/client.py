"""A client of an OpenAI-compatible server: completions with their clock, and what the server says of drafts.

Nothing is sent anywhere but to the server's own address: no proxies, no redirects. Whatever a server answers
that is not as it should be becomes one of two errors, both of which name the server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families
from requests.adapters import HTTPAdapter

from pipeline.errors import BadData, Incomplete

# What a server counts over all requests: rounds, proposals, acceptances by position, and tokens of any kind.
ROUNDS, PROPOSED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_draft_tokens"
ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos"
TOKENS = ("vllm:generation_tokens", "sglang:generation_tokens")
SETTLED_S = 2.0  # within which the counters of a request that has ended are up to date
# Greedy, whatever the model's generation_config.json says: vLLM would take penalties from it.
GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class Refused(BadData):
    """A request that the server did not take, or an answer that is none; the text has its words."""


@dataclass(frozen=True)
class Drafted:
    """What a server says of one request's rounds: how many, their proposals, and acceptances by position."""

    rounds: int
    proposed: int
    accepted_at: tuple[int, ...]


@dataclass
class Reply:
    """One completion, streamed.

    `tokens` is None where the server gives no token ids. `first_s` is the time to the first of them,
    `decode_s` that from the first to the last; `first_tokens` came at once with the first.
    `ended` says that it came to an end of its own, before the limit.
    """

    text: str = ""
    tokens: list[int] | None = None
    num_tokens: int = 0
    first_tokens: int = 1
    first_s: float = 0.0
    decode_s: float = 0.0
    drafted: Drafted | None = None
    ended: bool = False

    @property
    def decoded(self) -> int:
        """Tokens that came after the first ones, in `decode_s`."""
        return max(0, self.num_tokens - self.first_tokens)


@dataclass(frozen=True)
class Scrape:
    """A look at the metrics page: the counters by name, those by position by number; None where absent."""

    rounds: float | None = None
    proposed: float | None = None
    accepted_at: dict[int, float] = field(default_factory=dict)
    tokens: float | None = None


class Server:
    """An OpenAI-compatible server.

    Args:
        url: its address, with or without /v1.
        model: the name that it serves the model under; default: the only one that it serves.
        limit_s: the longest that an answer may take; the longest silence is half of that.
        at_once: threads that ask at the same time.

    Raises:
        Incomplete: if it does not answer.
        BadData: if it serves several models and none is named.
    """

    def __init__(self, url: str, model: str | None = None, limit_s: float = 600.0, at_once: int = 1) -> None:
        self.url, self.limit_s = url.rstrip("/").removesuffix("/v1"), limit_s
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy of the environment sees the prompts
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=at_once))
        self.model = model or self.only_model()

    def only_model(self) -> str:
        answer = self.get("/v1/models")
        with self.understood():
            names = [str(one["id"]) for one in answer.json()["data"]]
        if len(names) != 1:
            raise BadData(
                f"{self.url} serves {', '.join(names) or 'no model'}: name one with --served-as, "
                "or as labels.server.model"
            )
        return names[0]

    def get(self, path: str) -> requests.Response:
        try:
            answer = self.session.get(self.url + path, timeout=30, allow_redirects=False)
        except requests.RequestException as error:
            raise Incomplete(f"{self.url} does not answer ({shorten(error)}): is the server up?") from error
        if answer.status_code != 200:
            raise Incomplete(f"{self.url}{path} answers {answer.status_code}: {answer.text[:200]}")
        return answer

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Turns what reading an odd answer raises into `Refused`."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, BadData):
                raise
            raise Refused(f"{self.url} answers what is not understood ({error!r:.200})") from error

    def scrape(self) -> Scrape | None:
        """The counters of the metrics page; None where there is no such page."""
        try:
            text = self.get("/metrics").text
        except Incomplete:
            return None
        sums: dict[str, float] = {}
        accepted_at: dict[int, float] = {}
        try:
            samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        except ValueError:  # another page
            return None
        for sample in samples:
            name = sample.name.removesuffix("_total")
            if name == ACCEPTED_AT and sample.labels.get("position", "").isdecimal():
                position = int(sample.labels["position"])
                accepted_at[position] = accepted_at.get(position, 0.0) + sample.value
            elif name in (ROUNDS, PROPOSED, *TOKENS):
                sums[name] = sums.get(name, 0.0) + sample.value
        tokens = next((sums[name] for name in TOKENS if name in sums), None)
        return Scrape(sums.get(ROUNDS), sums.get(PROPOSED), accepted_at, tokens)

    def settled(self, before: Scrape, num_tokens: int) -> Scrape | None:
        """A later look, once the counters have the tokens of the request in between, or after seconds."""
        ends = time.perf_counter() + SETTLED_S
        while True:
            after = self.scrape()
            if after is None or before.tokens is None or after.tokens is None:
                return after
            if after.tokens - before.tokens >= num_tokens or time.perf_counter() > ends:
                return after
            time.sleep(0.1)

    def complete(self, prompt: Sequence[int], max_tokens: int, min_tokens: int = 0) -> Reply:
        """The greedy continuation of a prompt of token ids; of its first `min_tokens` none ends it.

        Raises:
            Refused: if the server does not take the request, or answers other than it is asked.
            Incomplete: if it is too slow, or ends in the middle.
        """
        asked = {
            "model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True, **GREEDY,
            **({"min_tokens": min_tokens} if min_tokens else {}),
        }  # fmt: skip
        reply, began, last = Reply(), time.perf_counter(), 0.0
        usage: dict[str, Any] = {}
        with self.understood():
            for event in self.events(asked, began):
                usage = event.get("usage") or usage
                told = (event.get("metrics") or {}).get("speculative_decoding")
                reply.drafted = drafted_of(told) if told else reply.drafted
                for choice in (event.get("choices") or [])[:1]:
                    text, ids = choice.get("text") or "", list(choice.get("token_ids") or [])
                    reply.ended = reply.ended or choice.get("finish_reason") == "stop"
                    if not (text or ids):
                        continue
                    last = time.perf_counter() - began
                    if not reply.first_s:
                        reply.first_s, reply.first_tokens = last, len(ids) or 1
                    reply.text += text
                    reply.tokens = [*(reply.tokens or []), *ids] if ids else reply.tokens
            reply.decode_s = max(0.0, last - reply.first_s)
            reply.num_tokens = int(usage.get("completion_tokens") or len(reply.tokens or []))
            read = usage.get("prompt_tokens")
        if read is not None and read != len(prompt):
            raise Refused(
                f"{self.url} read {read} tokens of a prompt of {len(prompt)}: it does not take token ids, or "
                "has another tokenizer"
            )
        return reply

    def events(self, asked: dict[str, Any], began: float) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer, up to its [DONE]."""
        try:
            with self.session.post(
                f"{self.url}/v1/completions",
                json=asked,
                stream=True,
                timeout=(30, self.limit_s / 2),
                allow_redirects=False,
            ) as answer:
                if answer.status_code != 200:
                    raise Refused(f"{self.url} answers {answer.status_code}: {answer.text[:300]}")
                for line in answer.iter_lines():
                    if time.perf_counter() - began > self.limit_s:
                        raise Incomplete(f"an answer of {self.url} took more than {self.limit_s:g} s")
                    data = line.decode("utf-8", "replace").removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    if line.startswith(b"data:"):
                        yield event_of(data, self.url)
        except requests.RequestException as error:
            raise Incomplete(f"an answer of {self.url} did not come to its end ({shorten(error)})") from error
        raise Incomplete(f"an answer of {self.url} was cut off: there was no [DONE]")


def event_of(data: str, url: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise Refused(f"{url} streams what is no JSON: {data[:100]!r}") from None
    if not isinstance(event, dict) or "error" in event:
        raise Refused(f"{url} answers {str(event)[:300]}")
    return event


def drafted_of(told: dict[str, Any]) -> Drafted:
    """vLLM's metrics of a request: `acceptance_histogram[j]` rounds accepted exactly j proposals."""
    by_count = [int(count) for count in told["acceptance_histogram"]]
    accepted_at = tuple(sum(by_count[at + 1 :]) for at in range(len(by_count) - 1))
    return Drafted(sum(by_count), int(told["num_draft_tokens"]), accepted_at)


def between(before: Scrape, after: Scrape, num_tokens: int) -> tuple[Drafted | None, str]:
    """What a request of so many tokens added to a server's counters; or None, and why they do not say."""
    if None in (before.rounds, before.proposed, after.rounds, after.proposed):
        return None, "the metrics page has no counters of drafts"
    positions = sorted(after.accepted_at)
    accepted_at = [after.accepted_at[at] - before.accepted_at.get(at, 0.0) for at in positions]
    rounds = (after.rounds or 0.0) - (before.rounds or 0.0)
    proposed = (after.proposed or 0.0) - (before.proposed or 0.0)
    if min(rounds, proposed, *accepted_at, 0.0) < 0:
        return None, "the server's counters restarted"
    if before.tokens is None or after.tokens is None or not num_tokens:
        return None, "how many tokens the answer has is not known, so neither is what else was counted"
    if after.tokens - before.tokens > num_tokens:
        return None, "other requests were on the same counters"
    if after.tokens - before.tokens < num_tokens:
        return None, f"the counters were behind for {SETTLED_S:g} s"
    return Drafted(int(rounds), int(proposed), tuple(map(int, accepted_at))), ""


def shorten(error: Exception) -> str:
    """The last cause of a library's error, on one line."""
    return str(error.args[0] if error.args else error).splitlines()[0][:160]
