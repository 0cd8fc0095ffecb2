"""`python -m benchmarks`: correctness first, then the table and `bench.json`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.rows import Row, table, write
from pipeline.hardware import gpu_name

GROUPS = ("decoding", "real", "training", "memory", "grid", "scale", "zero", "gate", "gpu")


def main() -> int:
    """Run the groups asked for; each writes when it is done. A check that fails is raised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=GROUPS, action="append", help="a group; may be given several times")
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    parser.add_argument("--storage", default="runs", help="where trained pairs are, or will be")
    parser.add_argument(
        "--target", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="the real one"
    )
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats of every comparison")
    given = parser.parse_args()
    groups = given.only or GROUPS
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(min(2, os.cpu_count() or 1))

    rows: list[Row] = []
    if "gpu" in groups:
        rows += gpu_rows()
        write(rows, given.output)
    if {"decoding", "training"} & set(groups):
        from benchmarks.pairs import realistic_pair, trained_pair

        print(f"trained pairs, in {given.storage} (trained now if they are not there)", flush=True)
        demo = trained_pair("demo", "conf/quickstart.yaml", given.storage, prompts=4)
        deep = trained_pair("deep", "conf/deep.yaml", given.storage, prompts=8)
        if "decoding" in groups:
            from benchmarks.decoding import decoding_rows

            rows += decoding_rows(demo, deep, realistic_pair(), given.repeats)
            write(rows, given.output)
        if "training" in groups:
            from benchmarks.training import training_rows

            print("training", flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                rows += training_rows(demo, deep, given.storage, Path(scratch), given.repeats)
            write(rows, given.output)
    if "real" in groups:
        from benchmarks.real_target import real_rows

        if given.target.is_dir():
            print("a real target", flush=True)
            rows += real_rows(given.target, given.repeats)
            write(rows, given.output)
        else:
            print(
                f"no rows of a real target: {given.target} is not there (`make demo` fetches it)",
                flush=True,
            )
    if "memory" in groups:
        from benchmarks.memory import memory_row

        rows.append(memory_row())
    if "grid" in groups:
        from benchmarks.grid import grid_rows

        print("the paper's grid", flush=True)
        rows += grid_rows()
    if "scale" in groups:
        from benchmarks.scale import scale_rows

        print("a sweep of 10,000 cells", flush=True)
        rows += scale_rows()
    if "zero" in groups:
        from benchmarks.zero import zero_rows

        print("ZeRO", flush=True)
        rows += zero_rows()
    if "gate" in groups:
        from benchmarks.gate import gate_rows

        print("the gate's error rates", flush=True)
        rows += gate_rows(given.storage)
    write(rows, given.output)
    print(f"\n{table(rows)}\n\n{given.output.resolve()}")
    return 0


def gpu_rows() -> list[Row]:
    """The rows that need a GPU; without one they stay empty."""
    from benchmarks.gpu import checks, decoding, kernels

    if not torch.cuda.is_available():
        print("no GPU: its rows stay empty", flush=True)
        return decoding.missing_rows()
    print("correctness", flush=True)
    for shapes in (checks.ODD, checks.REAL):
        for checked in checks.check_rows(shapes, "cuda"):
            assert checked.met, table([checked])
    decoding.check()
    sizes = kernels.Sizes()
    bandwidth = kernels.copy_bandwidth(sizes)
    print(f"{gpu_name()}, copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    return [*decoding.rows(decoding.Setting(), bandwidth, gpu_name()), *kernels.kernel_rows(sizes, bandwidth)]


if __name__ == "__main__":
    raise SystemExit(main())
