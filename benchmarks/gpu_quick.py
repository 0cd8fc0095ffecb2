"""What matters most on a GPU that is there for minutes.

    python -m benchmarks.gpu_quick --minutes 8 --out DIR

Needs torch, triton and transformers. Parts run one after another, the most important first, each as a process
of its own under a limit, so that one that fails or takes too long leaves the others. A part adds its rows to
`DIR/rows.jsonl` as soon as it has them; what was not come to is said in `DIR/gpu.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import checks, decoding, heads, kernels, together
from benchmarks.gpu.decoding import PAPER_POINTS, Setting
from benchmarks.gpu.training import Training, training_rows
from benchmarks.rows import Row, environment, row, table
from pipeline.hardware import cpu_name, gpu_name

ROWS, RESULT = "rows.jsonl", "gpu.json"
BANDWIDTH = "GPU copy bandwidth"
LEAST_S = 10.0  # with less time left no part is begun


@dataclass(frozen=True)
class Bench:
    """What is measured at one size, and where."""

    shapes: tuple[checks.Shapes, ...]
    sizes: kernels.Sizes
    side: int  # of the matrices whose product is timed
    decoding: Setting
    together: Setting
    training: Training


GPU = Bench(
    (checks.ODD, checks.REAL),
    kernels.Sizes(),
    8192,
    Setting(repeats=3, gammas=(4, 8, 16), budgets=(256, 1024)),
    Setting(repeats=3, new_tokens=128),
    Training(),
)


def toy() -> Bench:
    """The same work in seconds on a CPU, kernels by Triton's interpreter."""
    points = tuple(replace(point, tokens=64, gamma=5) for point in PAPER_POINTS)
    shape = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64}
    setting = Setting(
        device="cpu", compile="none", dtype=torch.float32, target=shape, drafter=shape, points=points,
        gammas=(2, 4), budget=16, budgets=(16,), new_tokens=12, repeats=2, inner=2,
    )  # fmt: skip
    sizes = kernels.Sizes(
        device="cpu", tokens=256, heads=2, width=16, budget=64, positions=16, hidden=32, vocabulary=300,
        rounds=(2, 3, 100), copied=2**16, repeats=2, compiled=False,
    )  # fmt: skip
    small = Training("cpu", shape, 2, 256, 2, 16, (16, 32), 4, repeats=2)
    few = checks.Shapes(*(of_kind[:2] for of_kind in vars(checks.ODD).values()))
    return Bench((few,), sizes, 64, setting, setting, small)


def measure_card(bench: Bench) -> Iterator[Row]:
    """What the card does: its memory, and its matrix units."""
    bandwidth = kernels.copy_bandwidth(bench.sizes)
    yield row(BANDWIDTH, [bandwidth / 1e9], unit=" GB/s", note="read and written")
    rates = kernels.matrix_rate(bench.sizes, bench.side)
    yield row("GPU bfloat16 product", [rate / 1e12 for rate in rates], unit=" TFLOP/s", note=f"{bench.side}²")


def check_kernels(bench: Bench) -> Iterator[Row]:
    for shapes in bench.shapes:
        yield from checks.check_rows(shapes, bench.sizes.device)


def check_decoding(bench: Bench) -> Iterator[Row]:
    """Compiled and captured decoding gives plain decoding's text; raises where it does not."""
    decoding.check(bench.decoding.device)
    yield row("GPU texts that differ between the ways to decode", [0.0], 0.0, at_most=True, unit="")


def check_heads(bench: Bench) -> Iterator[Row]:
    return heads.check_rows(bench.decoding.device)


def chain_at_4k(bench: Bench) -> Iterator[Row]:
    setting = replace(bench.decoding, gammas=(2, 4, 8))
    return heads.chain_rows(setting, setting.points[0])


def decode_at(number: int) -> Callable[[Bench], Iterator[Row]]:
    def measure(bench: Bench) -> Iterator[Row]:
        setting = replace(bench.decoding, points=(bench.decoding.points[number],))
        return decoding.rows(setting, kernels.copy_bandwidth(bench.sizes), bench.sizes.name)

    return measure


def time_kernels(bench: Bench) -> Iterator[Row]:
    return kernels.kernel_rows(bench.sizes, kernels.copy_bandwidth(bench.sizes))


def decode_together(bench: Bench) -> Iterator[Row]:
    return together.together_rows(bench.together, bench.together.points[0])


def train(bench: Bench) -> Iterator[Row]:
    yield from training_rows(bench.training)


@dataclass(frozen=True)
class Part:
    """One piece of work, and the most seconds that it may take."""

    measure: Callable[[Bench], Iterator[Row]]
    limit_s: float


PARTS = {
    "kernels are right": Part(check_kernels, 90),
    "the card": Part(measure_card, 30),
    "decoding at 4K": Part(decode_at(0), 100),
    "decoding at 16K": Part(decode_at(2), 100),
    "heads are right": Part(check_heads, 90),
    "a head at 4K": Part(chain_at_4k, 80),
    "kernels' speed": Part(time_kernels, 110),
    "a training step": Part(train, 60),
    "prompts together": Part(decode_together, 90),
    "decoding is right": Part(check_decoding, 90),
    "decoding at 8K": Part(decode_at(1), 100),
}


@dataclass
class Outcome:
    """How a part ended: done, failed, out of time, or not begun."""

    part: str
    state: str
    seconds: float = 0.0
    said: str = ""


def run_part(name: str, bench: Bench, out: Path) -> None:
    """Inside the part's process: its rows, one after another, to the end of the file."""
    versions, commit = environment()
    with (out / ROWS).open("a", encoding="utf-8") as file:
        for made in PARTS[name].measure(bench):
            told = replace(made, device=bench.sizes.name)
            line = asdict(told) | {"part": name, "versions": versions, "commit": commit}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            print(table([told]).splitlines()[1], flush=True)


def start_part(name: str, given: argparse.Namespace, limit_s: float) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.gpu_quick", "--out", str(given.out), "--part", name]
    began = time.monotonic()
    log = given.out / f"{name.replace(' ', '-')}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *(["--toy"] if given.toy else [])], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    seconds, said = round(time.monotonic() - began, 1), log.read_text(encoding="utf-8", errors="replace")
    print(said, end="", flush=True)
    if code == 0:
        return Outcome(name, "done", seconds)
    state = f"out of its {limit_s:.0f} s" if code is None else f"failed with {code}"
    return Outcome(name, state, seconds, said[-2000:])


def write_result(given: argparse.Namespace, outcomes: list[Outcome], seconds: float) -> list[dict[str, Any]]:
    """Write `gpu.json`; returns the rows so far."""
    versions, commit = environment()
    file = given.out / ROWS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    result = {
        "device": cpu_name() if given.toy else gpu_name(),
        "toy": given.toy,
        "versions": versions,
        "commit": commit,
        "command": f"python -m benchmarks.gpu_quick --minutes {given.minutes:g}",
        "seconds": round(seconds, 1),
        "parts": [asdict(outcome) for outcome in outcomes],
        "rows": rows,
    }
    temporary = given.out / f".{RESULT}.tmp"
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, given.out / RESULT)
    return rows


def main() -> int:
    """Exit code 0 if all parts are done and what they checked is right, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_quick")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="a toy on the CPU, for the tests")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.toy:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print(
            "this machine has no GPU that torch can use; --toy tries the script on the CPU", file=sys.stderr
        )
        return 2
    if given.part:
        run_part(given.part, toy() if given.toy else GPU, given.out)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / ROWS).unlink(missing_ok=True)
    began, outcomes, rows = time.monotonic(), [], []
    for name, part in PARTS.items():
        left_s = 60 * given.minutes - (time.monotonic() - began)
        begin = left_s >= LEAST_S
        print(f"{name}{'' if begin else ': not begun, the time is over'}", flush=True)
        limit_s = min(part.limit_s, left_s)
        outcomes.append(start_part(name, given, limit_s) if begin else Outcome(name, "not begun"))
        rows = write_result(given, outcomes, time.monotonic() - began)
    for outcome in outcomes:
        print(f"{outcome.part:20} {outcome.state:20} {outcome.seconds:6.1f} s")
    print((given.out / RESULT).resolve())
    wrong = [one for one in rows if one["part"].endswith("are right") and not one["met"]]
    return 0 if all(outcome.state == "done" for outcome in outcomes) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
