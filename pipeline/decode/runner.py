"""One model made ready for decoding steps: caches, compiled steps, CUDA graphs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache as remember
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.decode.model import DecodeModel
from pipeline.decode.sampling import Rule
from pipeline.decode.steps import Tensors, advance, advance_noted, draft, propose, propose_surely, verify
from pipeline.errors import BadData
from pipeline.hardware import available_memory
from pipeline.kv.slot_cache import SlotCache

LOGIT_COPIES = 4  # of a round's logits: as they are, in fp32, as probabilities of both models


class NotEnoughMemory(RuntimeError):
    """What is about to be allocated does not fit."""


class Runners:
    """Static caches and the steps over them; each is made once, and kept while its prompts' shapes last."""

    def __init__(self, compile: Compile) -> None:
        self.compile = compile
        self.held: dict[tuple[str, int, int, int, int], Runner] = {}
        self.shapes: tuple[int, ...] = ()
        self.past_compile_s = 0.0

    @property
    def compile_s(self) -> float:
        """Seconds of compilation so far."""
        return self.past_compile_s + sum(runner.compile_s for runner in self.held.values())

    def begin(self, *shapes: int) -> None:
        """Free the caches of prompts of other shapes; what is compiled stays."""
        if shapes != self.shapes:
            self.past_compile_s = self.compile_s
            self.held.clear()
            self.shapes = shapes

    def get(
        self, role: Literal["target", "drafter"], model: DecodeModel, rows: int, capacity: int, room: int
    ) -> Runner:
        """A model over a cache of `rows` prompts, `capacity` kept entries and `room` more tokens.

        One model may be both: the target that speculates for itself verifies with another cache.

        Raises:
            NotEnoughMemory: if the cache, and what loading and a round need beside it, do not fit.
        """
        key = (role, id(model), rows, capacity, room)
        if key not in self.held:
            one_row = model.geometry.num_bytes(1, capacity + room)
            logits = LOGIT_COPIES * 4 * rows * room * model.num_tokens
            needed, there = (rows + 1) * one_row + logits, available_memory(model.geometry.device)
            if needed > there:
                raise NotEnoughMemory(
                    f"decoding {rows} prompt(s) of {capacity} kept entries with {model.name} needs "
                    f"{needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free: lower "
                    "sweep.measure.prompts_together, the contexts or data.max_new_tokens"
                )
            self.held[key] = Runner(model, rows, capacity, room, self.compile)
        return self.held[key]


Compile = Literal["none", "inductor", "cudagraphs"]


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


class Runner:
    """One model, its static cache, and how their steps run. Target and drafter have a runner each.

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
        """See `steps.advance`; the other methods run the steps of their names."""
        return self.run(advance, rule, arguments)

    def advance_noted(self, rule: Rule, *arguments: Tensor | None) -> Any:
        return self.run(advance_noted, rule, arguments)

    def propose(self, rule: Rule, *arguments: Tensor | None) -> Any:
        return self.run(propose, rule, arguments)

    def propose_surely(self, rule: Rule, *arguments: Tensor | None) -> Any:
        return self.run(propose_surely, rule, arguments)

    def verify(self, rule: Rule, *arguments: Tensor | None) -> Any:
        return self.run(verify, rule, arguments)

    def draft(self, rule: Rule, count: int, *arguments: Tensor | None) -> Any:
        """See `steps.draft`."""
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
        """Run a step; `graph` is the key of a step that is made of compiled steps already."""
        if self.compile == "none":
            return step(self.model, self.cache, rule, *arguments)
        shapes = (None if tensor is None else tensor.shape for tensor in arguments)
        key = (graph or step, rule, self.cache.span, self.cache.asked is None, *shapes)
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
