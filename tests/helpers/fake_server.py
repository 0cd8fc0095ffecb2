"""An OpenAI-compatible server in a thread: texts given or a model's, counts of drafts; it can misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Drafts = tuple[int, int, list[int]]  # rounds, proposals, acceptances by position


@dataclass
class Fake:
    """What the server does.

    Args:
        text: of a prompt, the tokens that it answers with.
        drafts: of a prompt, the rounds of the answer.
        tells: whether counts come with the answer, are on the metrics page, or nowhere.
        fault: what goes wrong with a request; "" is nothing.
        only: the number of the request that goes wrong; None: all of them.
        eos: tokens that end a text, which is then said, and are not spelled.
        spell: of tokens, their text.
    """

    text: Callable[[Sequence[int]], list[int]]
    drafts: Callable[[Sequence[int]], Drafts] = lambda _: (0, 0, [])
    tells: str = "request"
    fault: str = ""
    only: int | None = None
    eos: frozenset[int] = frozenset()
    spell: Callable[[Sequence[int]], str] = lambda tokens: "".join(f" {token}" for token in tokens)
    models: tuple[str, ...] = ("target",)
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 1000
    proposed: int = 4000
    accepted_at: list[int] = field(default_factory=lambda: [500, 300, 200, 100])
    tokens: int = 9000

    def goes_wrong(self) -> str:
        return self.fault if self.only is None or self.only == len(self.asked) - 1 else ""

    def count(self, prompt: Sequence[int], tokens: int) -> None:
        rounds, proposed, accepted_at = self.drafts(prompt)
        self.rounds += rounds
        self.proposed += proposed
        self.tokens += tokens
        self.accepted_at = [a + b for a, b in zip(self.accepted_at, accepted_at, strict=False)]

    def page(self) -> str:
        if self.tells != "metrics":
            return "# nothing of drafts\n"
        lines = [
            f'vllm:generation_tokens_total{{model_name="target"}} {self.tokens}',
            f'vllm:spec_decode_num_drafts_total{{engine="0"}} {self.rounds}',
            f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {self.proposed}',
        ]
        lines += [
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{at}"}} {count}'
            for at, count in enumerate(self.accepted_at)
        ]
        return "\n".join(lines) + "\n"


def greedy_texts(folder: Path, limit: int, ends: bool = True) -> Callable[[Sequence[int]], list[int]]:
    """What transformers' `generate` writes with the model of a folder; no EOS in it where it never `ends`."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    def text(prompt: Sequence[int]) -> list[int]:
        tokens = torch.tensor([list(prompt)])
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=limit,
            min_new_tokens=None if ends else limit,
            do_sample=False,
            pad_token_id=0,
        )
        made: list[int] = written[0, tokens.shape[1] :].tolist()
        return made

    return text


def histogram(drafts: Drafts) -> list[int]:
    """Rounds by how many proposals they accepted, from acceptances by position."""
    rounds, _, accepted_at = drafts
    reached = [rounds, *accepted_at, 0]
    return [one - two for one, two in pairwise(reached)]


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def answer(self, content: str, status: int = 200) -> None:
            data = content.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.answer(json.dumps({"data": [{"id": name} for name in fake.models]}))
            elif self.path == "/metrics" and fake.tells == "page":
                self.answer("<html>a { page } of something else</html>")
            elif self.path == "/metrics" and fake.tells != "nothing":
                self.answer(fake.page())
            else:
                self.answer("not here", 404)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.asked.append(asked)
            wrong, prompt = fake.goes_wrong(), asked["prompt"]
            broken = {
                "no_json": b"data: {half of it\n\n",
                "error": b'data: {"error": {"message": "out of memory"}}\n\n',
            }.get(wrong)
            if wrong == "refuse":
                return self.answer('{"message": "the prompt is longer than the model can take"}', 400)
            self.send_response(200)
            self.end_headers()
            if broken:
                self.wfile.write(broken)
                return None
            tokens = fake.text(prompt)
            ended = len(tokens) > 0 and tokens[-1] in fake.eos
            spelled = [fake.spell(tokens[: min(end, len(tokens) - ended)]) for end in range(len(tokens) + 3)]
            for at in range(0, len(tokens), 3):
                part = tokens[at : at + 3]
                choice: dict[str, Any] = {"index": 0, "text": spelled[at + 3][len(spelled[at]) :]}
                if at + 3 >= len(tokens):
                    choice["finish_reason"] = "stop" if ended else "length"
                if wrong != "no_ids":
                    choice["token_ids"] = part
                self.event({"choices": [choice]})
                if wrong == "cut" and at:
                    return None
                if wrong == "hang" and at:
                    time.sleep(5)
                    return None
            drafts = fake.drafts(prompt)
            if wrong == "restart":
                fake.rounds, fake.proposed, fake.accepted_at, fake.tokens = 0, 0, [0] * 4, 0
            fake.count(prompt, len(tokens) - (5 if wrong == "behind" else 0))
            if wrong == "traffic":
                fake.count(prompt, 50)
            read = len(prompt) + (2 if wrong == "other_tokenizer" else 0)
            usage = {"prompt_tokens": read, "completion_tokens": len(tokens)}
            last: dict[str, Any] = {"choices": [], "usage": usage}
            if fake.tells == "request":
                told: dict[str, Any] = {"num_draft_tokens": drafts[1]}
                if wrong != "no_histogram":
                    told["acceptance_histogram"] = histogram(drafts)
                last["metrics"] = {"speculative_decoding": told}
            self.event(last)
            self.wfile.write(b"data: [DONE]\n\n")
            return None

        def event(self, content: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
