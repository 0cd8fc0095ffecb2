"""What a decoder does on the device without asking the host: propose a token, draft γ of them, verify them.

The steps are functions of tensors. `Side` runs them for one model over one static cache: as they are,
compiled, or captured as CUDA graphs; a graph holds all γ draft steps, another one the verification. Compiled
code belongs to shapes, so that models and caches of equal shapes share it.

Shape legend: B rows, Q new tokens, T proposals of a round, T1 is T + 1, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as remember
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.dispatch import Backend
from pipeline.decode.model import DecodeModel
from pipeline.errors import BadData
from pipeline.kv.slot_cache import SlotCache

Compile = Literal["none", "inductor", "cudagraphs"]
Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen and proposals accepted: by the arg-max at temperature 0, else by sampling."""

    temperature: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits.float() / self.temperature).softmax(-1)

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """A token per row [B], the best logit [B], and when sampling the probabilities [B, V] drawn from.

        A logit of NaN or +inf shows in the best one.
        """
        best_B, token_B = logits_BV.max(-1)
        if self.greedy:
            return token_B, best_B, None
        assert uniform_B is not None
        q_BV = self.probabilities(logits_BV)
        return reference.draw(q_BV, uniform_B).clamp_min(0), best_B, q_BV

    def accept(
        self,
        draft_BT: Tensor,
        q_BTV: Tensor | None,
        logits_BT1V: Tensor,
        uniforms_BT1: Tensor | None,
        lengths_B: Tensor,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """Accepted proposals [B] of each round, and the target's token after them [B]."""
        if self.greedy:
            return dispatch.greedy_accept(draft_BT, logits_BT1V.argmax(-1), lengths_B, backend)
        assert q_BTV is not None and uniforms_BT1 is not None
        p_BT1V = self.probabilities(logits_BT1V)
        return dispatch.rejection_accept(draft_BT, q_BTV, p_BT1V, uniforms_BT1, lengths_B, backend)


def propose(
    model: DecodeModel,
    cache: SlotCache,
    rule: Rule,
    tokens_BQ: Tensor,
    step_B: Tensor,
    uniform_B: Tensor | None,
    surely: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Read Q tokens, the first being continuation token `step_B`, and choose the next.

    Returns:
        The token [B, 1], its number [B], the best logit [B], when sampling all probabilities [B, V], and if
        `surely` the probability [B] that the model gives its token.
    """
    logits_BV = model.logits(model.hidden(tokens_BQ, step_B, cache)[:, -1])
    token_B, best_B, q_BV = rule.choose(logits_BV, uniform_B)
    token_B1, confidence_B = token_B.unsqueeze(1), None
    if surely:
        shares_BV = logits_BV.float().softmax(-1) if q_BV is None else q_BV
        confidence_B = shares_BV.gather(1, token_B1).squeeze(1)
    return token_B1, step_B + tokens_BQ.shape[1], best_B, q_BV, confidence_B


propose_surely = partial(propose, surely=True)


def advance(
    model: DecodeModel,
    cache: SlotCache,
    rule: Rule,
    token_B1: Tensor,
    step_B: Tensor,
    uniform_B1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One autoregressive step: the next token [B, 1], its number [B], and what the host is told [B, 2].

    The host is told the token, and 1 if the logits were finite.
    """
    uniform_B = None if uniform_B1 is None else uniform_B1[:, 0]
    token_B1, step_B, best_B, _, _ = propose(model, cache, rule, token_B1, step_B, uniform_B)
    return token_B1, step_B, torch.cat([token_B1, best_B.isfinite().unsqueeze(1).long()], 1)


def verify(
    model: DecodeModel,
    cache: SlotCache,
    rule: Rule,
    pair_B2: Tensor,
    draft_BT: Tensor,
    step_B: Tensor,
    best_BT: Tensor,
    q_BTV: Tensor | None,
    uniforms_BT1: Tensor | None,
    lengths_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the last of two tokens and T proposals in one pass, and accept.

    Returns:
        What the host is told [B, T + 4]: the number accepted, 1 if the target's logits were finite, 1 if the
        drafter's were, and the proposals with the target's token behind the accepted ones. Then what the next
        round begins with: the last two tokens [B, 2], and the number of the last [B].
    """
    tokens_BT1 = torch.cat([pair_B2[:, 1:], draft_BT], 1)
    logits_BT1V = model.logits(model.hidden(tokens_BT1, step_B, cache))
    accepted_B, next_B = rule.accept(draft_BT, q_BTV, logits_BT1V, uniforms_BT1, lengths_B, cache.backend)
    # -1, which says that nothing could be drawn, is no token; the logits tell the host of it.
    accepted_B1, next_B1 = accepted_B.unsqueeze(1), next_B.clamp_min(0).unsqueeze(1)
    finite_B = [values.isfinite().all(1, keepdim=True).long() for values in (logits_BT1V.amax(-1), best_BT)]
    emitted_BT1 = torch.cat([draft_BT, next_B1], 1).scatter(1, accepted_B1, next_B1)
    told = torch.cat([accepted_B1, *finite_B, emitted_BT1], 1)
    pair_B2 = torch.cat([tokens_BT1.gather(1, accepted_B1), next_B1], 1)
    return told, pair_B2, step_B + accepted_B + 1


def draft(
    propose: Callable[..., Any], count: int, tokens_BQ: Tensor, step_B: Tensor, uniforms_TB: Tensor | None
) -> Tensors:
    """Propose `count` tokens, one after the other.

    Args:
        tokens_BQ: what the cache has not read yet, the first being continuation token `step_B`.

    Returns:
        The proposals [B, T], their best logits [B, T], and when sampling their probabilities [B, T, V].
    """
    tokens: list[Tensor] = []
    bests: list[Tensor] = []
    probabilities: list[Tensor] = []
    for number in range(count):
        uniform_B = None if uniforms_TB is None else uniforms_TB[number]
        tokens_BQ, step_B, best_B, q_BV, _ = propose(tokens_BQ, step_B, uniform_B)
        tokens.append(tokens_BQ)
        bests.append(best_B)
        probabilities += [] if q_BV is None else [q_BV]
    q_BTV = torch.stack(probabilities, 1) if probabilities else None
    return torch.cat(tokens, 1), torch.stack(bests, 1), q_BTV


@remember
def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step compiled for static shapes; one compiler cache serves all models and caches."""
    # One entry for every shape that a process decodes with; the default gives up at eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(step, fullgraph=True, dynamic=False)


def cpp_compiler() -> str | None:
    """The compiler that inductor will call on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


class Captured:
    """A function of tensors as a CUDA graph; arguments are copied in, results copied out."""

    def __init__(self, function: Callable[..., Tensors], arguments: Sequence[Tensor | None]) -> None:
        self.inputs = [None if tensor is None else tensor.clone() for tensor in arguments]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # lazy initialisation and compilation must not be captured
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *arguments: Tensor | None) -> Tensors:
        for held, given in zip(self.inputs, arguments, strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        self.graph.replay()
        return tuple(None if tensor is None else tensor.clone() for tensor in self.outputs)


class Side:
    """One model, its static cache, and how their steps run. Target and drafter are one each.

    Attributes:
        compile_s: seconds that the first calls of each shape took, compilation and capture included.

    Raises:
        BadData: if the model or its device cannot be compiled or captured as asked.
    """

    def __init__(self, model: DecodeModel, rows: int, capacity: int, room: int, compile: Compile) -> None:
        if compile != "none" and not model.compilable:
            raise BadData(
                f"decode.compile: {compile} is for Llama, Mistral, Qwen2 and Qwen3, and {model.name} is "
                "none of them (or scales its positions with the length of the text); set none"
            )
        if compile == "cudagraphs" and model.geometry.device.type != "cuda":
            raise BadData("decode.compile: cudagraphs needs a CUDA device; set inductor or none")
        if compile == "inductor" and model.geometry.device.type == "cpu" and not cpp_compiler():
            raise BadData("decode.compile: inductor needs a C++ compiler on a CPU: install g++, or set none")
        self.model, self.compile = model, compile
        self.cache = SlotCache(model.geometry, rows, capacity, room, model.rotation)
        self.compile_s = 0.0
        self.ready: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def advance(self, rule: Rule, *arguments: Tensor | None) -> Any:
        """See `advance`, as for the other steps."""
        return self.run(advance, rule, arguments)

    def propose(self, rule: Rule, *arguments: Tensor | None) -> Any:
        return self.run(propose, rule, arguments)

    def propose_surely(self, rule: Rule, *arguments: Tensor | None) -> Any:
        return self.run(propose_surely, rule, arguments)

    def verify(self, rule: Rule, *arguments: Tensor | None) -> Any:
        return self.run(verify, rule, arguments)

    def draft(self, rule: Rule, count: int, *arguments: Tensor | None) -> Any:
        """See `draft`."""
        if self.compile == "cudagraphs":
            inner = partial(compiled(propose), self.model, self.cache, rule)
            return self.run(partial(draft, inner, count), rule, arguments, ("draft", count))
        return draft(partial(self.propose, rule), count, *arguments)  # type: ignore[arg-type]

    def run(
        self,
        step: Callable[..., Any],
        rule: Rule,
        arguments: Sequence[Tensor | None],
        graph: tuple[Any, ...] = (),
    ) -> Any:
        """Run a step; `graph` names one that is a graph of compiled steps already."""
        if self.compile == "none":
            return step(self.model, self.cache, rule, *arguments)
        key = (graph or step, rule, *(None if tensor is None else tensor.shape for tensor in arguments))
        if key not in self.ready:
            began = time.perf_counter()
            function = step if graph else partial(compiled(step), self.model, self.cache, rule)
            # Steps write the same KV to the same slots however often they run.
            if self.compile == "cudagraphs":
                function = Captured(function, arguments)
            function(*arguments)
            self.ready[key] = function
            self.compile_s += time.perf_counter() - began
        return self.ready[key](*arguments)
