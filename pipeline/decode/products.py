"""Linear layers on few rows of input, in the form that is fastest on this machine's CPU.

A decoding step reads all weights for a handful of rows: one row when drafting or decoding alone, γ + 1 when
verifying. `F.linear` comes near the memory's speed for one row; for two to nine it takes twice as long and
more on CPUs without AVX-512. The same product as `weight @ rowsᵀ`, or over weights that oneDNN has packed,
does not. Which is best depends on shape, rows and machine, so it is measured once, where a large model is
loaded, and kept in a file of the user's cache. Forms differ in rounding alone, as passes over one and several
tokens do.

Packed weights are a second copy in memory.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.hardware import cpu_name

Form = Literal["linear", "transposed", "packed"]
FORMS: tuple[Form, ...] = get_args(Form)
MOST_ROWS = 16
LARGE_BYTES = 100 * 2**20  # of a model's weights: smaller ones stay in a cache, where nothing is to be gained
SAMPLE_BYTES = 48 * 2**20  # of weights of one shape that are read in turn, more than caches hold
TRIES = 3
PACKED_FOR = 5  # rows that oneDNN is told of when it packs


class Linear:
    """`x @ weightᵀ + bias`. `forms` by number of rows: the fastest, and the fastest that can be compiled."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.packed: Tensor | None = None
        self.forms: dict[int, tuple[Form, Form]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not self.forms:
            return F.linear(x, self.weight, self.bias)
        rows = x.numel() // x.shape[-1]
        fastest, compilable = self.forms.get(rows, ("linear", "linear"))
        return self.times(x, compilable if torch.compiler.is_compiling() else fastest)

    def times(self, x: Tensor, form: Form) -> Tensor:
        if form == "packed":
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if form == "linear":
            return F.linear(x, self.weight, self.bias)
        out = torch.mm(self.weight, x.flatten(0, -2).t()).t().contiguous().view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias

    def pack(self) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR)


def packed_bytes(weights: int, itemsize: int, device: str) -> int:
    """The most that packed copies of weights take: 0 but of large models on a CPU in fp32."""
    packs = device == "cpu" and itemsize == 4 and torch.backends.mkldnn.is_available()
    return weights if packs and weights >= LARGE_BYTES else 0


def choose_forms(layers: Iterable[Linear]) -> None:
    """Give the linear layers of a large model on a CPU their fastest forms; others stay as they are."""
    layers = list(layers)
    first = layers[0].weight
    if not packed_bytes(sum(layer.weight.nbytes for layer in layers), first.itemsize, first.device.type):
        return
    by_shape: dict[tuple[int, ...], list[Linear]] = {}
    for layer in layers:
        by_shape.setdefault(tuple(layer.weight.shape), []).append(layer)
    known = read_known()
    for shape, alike in by_shape.items():
        key = f"{cpu_name()}, torch {torch.__version__}, {shape}"
        if key not in known:
            known[key] = measure(alike)
            write_known(known)
        forms = {rows: best(seconds) for rows, seconds in known[key].items()}
        for layer in alike:
            layer.forms = forms
            layer.packed = None
            if any("packed" in pair for pair in forms.values()):
                layer.pack()


Seconds = dict[Form, float]


def best(seconds: Seconds) -> tuple[Form, Form]:
    """The fastest form, and the fastest one that a compiler can take in."""
    fastest = min(FORMS, key=lambda form: seconds[form])
    return fastest, min(FORMS[:2], key=lambda form: seconds[form])


def measure(layers: Sequence[Linear]) -> dict[int, Seconds]:
    """Seconds of each form by number of rows, over several layers of one shape in turn; forms alternate."""
    count = max(1, -(-SAMPLE_BYTES // layers[0].weight.nbytes))
    sample = layers[:count]
    for layer in sample:
        layer.pack()
    found: dict[int, Seconds] = {}
    generator = torch.Generator().manual_seed(0)  # not the one that models and texts are drawn by
    for rows in range(1, MOST_ROWS + 1):
        x = torch.randn(1, rows, layers[0].weight.shape[1], generator=generator)
        found[rows] = dict.fromkeys(FORMS, float("inf"))
        for _ in range(TRIES):
            for form in FORMS:
                began = time.perf_counter()
                for layer in sample:
                    layer.times(x, form)
                found[rows][form] = min(found[rows][form], time.perf_counter() - began)
    return found


def cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "budgetdraft" / "products.json"


def read_known() -> dict[str, dict[int, Seconds]]:
    """What was measured on this machine before; a file that cannot be used counts as none."""
    try:
        stored = json.loads(cache_file().read_text(encoding="utf-8"))
        return {key: {int(n): seconds_of(row) for n, row in rows.items()} for key, rows in stored.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def seconds_of(row: dict[str, float]) -> Seconds:
    return {form: float(row[form]) for form in FORMS}


def write_known(known: dict[str, dict[int, Seconds]]) -> None:
    """Keep it, where the user has a folder to keep things in; else it is measured again next time."""
    file = cache_file()
    if file.parts[0] == "~":  # a user without a home
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)
