"""Training in a gloo group of processes on this machine, without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing as multiprocessing

from jobs.executors.ray_train import read_settings
from pipeline.train.checkpoints import resume, save
from pipeline.train.job import TrainJob, load_drafter, run_job
from pipeline.train.loop import Schedule
from tests.helpers.tiny import VOCABULARY


def run_group(world: int, tasks: list[Callable[[], None]]) -> None:
    """Every rank does all tasks, one after another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (world, port, tasks), nprocs=world)


def work(rank: int, world: int, port: int, tasks: list[Callable[[], None]]) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in group.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    for task in tasks:
        task()
    if torch.distributed.is_initialized():
        # As Ray Train does: a rank that leaves with its group standing can be aborted by gloo's threads.
        torch.distributed.destroy_process_group()


def train(job: TrainJob) -> None:
    from jobs.executors.deepspeed_engine import deepspeed_engine

    run_job(job, deepspeed_engine(job.config, read_settings(job.config.train.deepspeed)))


def copy_state(job: TrainJob, source: Path, target: Path) -> None:
    """Load the newest checkpoint of a folder into a fresh engine, and write it into another folder."""
    from jobs.executors.deepspeed_engine import deepspeed_engine

    assert job.drafter is not None
    make = deepspeed_engine(job.config, read_settings(job.config.train.deepspeed))
    schedule = Schedule(job.config.train, job.config.train, job.config.train.steps)
    layers_alone = job.config.drafter.kind == "first_layers"
    engine = make(load_drafter(job.drafter, VOCABULARY, layers_alone=layers_alone), schedule)
    save(engine, target, resume(engine, source).step, [])
