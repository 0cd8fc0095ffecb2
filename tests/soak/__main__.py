"""An hour of random faults: `python -m tests.soak --minutes 60 --seed 1`.

Pipelines run one after another on a cluster of three nodes, mirrored by a real MLflow server. Every 20 to 60
seconds something is broken (`breaking.py`). A pipeline that ends with less than everything done is started
again, until it is whole (`pipelines.py`). The seed gives the kinds of pipelines and the order and times of
faults; what a fault meets depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp

import psutil

from pipeline.hardware import cpu_name
from pipeline.store.provenance import provenance
from tests.helpers.clock import patience
from tests.helpers.reliability import SOAK, write_page
from tests.soak.ground import MARK, standing
from tests.soak.pipelines import Pipelines, Soak, say


def run(soak: Soak, folder: Path) -> None:
    with standing(folder) as ground:
        pipelines = Pipelines(ground, soak)
        pipelines.undisturbed()
        began = time.monotonic()
        while time.monotonic() - began < 60 * soak.minutes:
            pipelines.one()
    _, alive = psutil.wait_procs(started_here(), timeout=patience(30))
    soak.left_running = [" ".join(process.cmdline())[:200] for process in alive]


def started_here() -> list[psutil.Process]:
    """Everything alive that this process has started, and what that has started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(os.getpid()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    os.environ[MARK] = str(os.getpid())
    folder = Path(mkdtemp(prefix="soak-", dir="/tmp"))  # short, for Ray's sockets
    soak = Soak(given.seed, given.minutes, {"cpu": cpu_name(), **provenance()})
    say(f"{given.minutes:g} minutes with seed {given.seed}, below {folder}")
    run(soak, folder)
    SOAK.write_text(json.dumps(asdict(soak), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page()
    say(f"{soak.whole} of {soak.pipelines} pipelines whole, {soak.lost} pieces lost; written to {SOAK}")
    if not soak.good:
        say(f"what is left is below {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
