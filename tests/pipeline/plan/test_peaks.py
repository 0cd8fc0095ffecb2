"""What is counted once, twice or not: frozen weights, packed weights."""

from __future__ import annotations

from dataclasses import replace

from pipeline.decode.products import packed_bytes
from pipeline.hardware import Device
from pipeline.models.shape import Shape
from pipeline.plan.peaks import weights_together

GPU, CPU = Device("cuda", 0), Device("cpu", 0)
SHAPE = Shape(parameters=1000, layers=1, hidden=10, query=10, kv=10, intermediate=20, vocab=60)
PARTLY = replace(SHAPE, frozen=700)
LARGE = replace(SHAPE, parameters=40_000_000)


def test_what_lies_around_the_layers_is_counted_once() -> None:
    assert weights_together([SHAPE, PARTLY, PARTLY], GPU) == 4 * (1000 + 2 * 300)
    assert weights_together([PARTLY, PARTLY], GPU) == 4 * (700 + 2 * 300)
    assert weights_together([SHAPE, SHAPE], GPU) == 4 * 2000
    assert weights_together([], GPU) == 0


def test_large_models_are_packed_on_a_cpu_in_fp32() -> None:
    assert packed_bytes(LARGE.weights, 4, "cpu") == LARGE.weights == 160_000_000
    cases = ((LARGE.weights, 4, "cuda"), (SHAPE.weights, 4, "cpu"), (LARGE.weights, 2, "cpu"))
    assert [packed_bytes(*case) for case in cases] == [0, 0, 0]
    assert weights_together([LARGE, SHAPE], CPU) == 2 * LARGE.weights + SHAPE.weights
