"""The memory of each rank by ZeRO stage: gloo ranks on this machine train a scratch model of 30M parameters.

Each setting of `conf/deepspeed` is trained in fresh processes, since a process's peak never falls. They are
forked from a process that has imported everything, and first train a small model, so that the libraries' code
and buffers do not count. A peak's target is the schedule's estimate, which is meant to be an upper bound. On
a CPU offload moves nothing.
"""

from __future__ import annotations

import gc
import json
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, multiprocessing

from benchmarks.grid import VOCABULARY, word_tokenizer
from benchmarks.rows import Row, row
from jobs.executors.ray_train import read_settings
from pipeline.config.files import load_config
from pipeline.config.models import Pretrain, ScratchModel
from pipeline.hardware import Device
from pipeline.models.build import build_random, build_scratch
from pipeline.models.shape import Shape, shape_of_model
from pipeline.train.engine import Engine, TorchEngine
from pipeline.train.loop import Schedule
from pipeline.train.objectives import next_token_loss
from pipeline.train.sharding import Sharding, sharding_of, training_step

CONF = Path(__file__).resolve().parent.parent / "conf"
SETTINGS = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
RANKS = (2, 4)
BATCH, LENGTH, STEPS, LEARNING_RATE = 4, 64, 3, 1e-3  # sequences, their tokens, optimizer steps
TOLERANCE = 1e-4  # of losses, relative
OVERRIDES = (
    f"train.batch_sequences={BATCH}", "train.micro_batch_sequences=1", "train.dtype=float32",
    "run.device=cpu",
)  # fmt: skip
SMALL = ScratchModel(
    kind="scratch", layers=1, hidden=64, heads=2, kv_heads=2, intermediate=128, max_positions=LENGTH,
    pretrain=Pretrain(steps=0),
)  # fmt: skip
LARGE = SMALL.model_copy(update={"layers": 7, "hidden": 512, "heads": 8, "kv_heads": 8, "intermediate": 2048})
PRELOADED = [
    "benchmarks.zero",
    "jobs.executors.deepspeed_engine",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
]


@dataclass(frozen=True)
class Held:
    """The losses of one rank, and its memory in bytes.

    `peak` is resident memory above what the process had before the model. The other sizes are of tensors that
    the rank holds between the last backward pass and the optimizer's step; `optimizer` counts moments and
    master weights.
    """

    losses: list[float]
    peak: int
    weights: int
    gradients: int
    optimizer: int


def zero_rows(
    ranks: Sequence[int] = RANKS, settings: Sequence[str] = SETTINGS, model: ScratchModel = LARGE
) -> list[Row]:
    """The peak of each setting, its losses checked against those of one process without DeepSpeed."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported, by the fork server
    with torch.device("meta"):
        shape = shape_of_model(build_random(model, VOCABULARY))
    [plain] = train_group(None, 1, model)
    rows = [peak_row("torch without DeepSpeed, 1 rank", [plain], Sharding(), shape)]
    for world in ranks:
        for name in settings:
            label = f"{name}, {world} ranks"
            held = train_group(name, world, model)
            check_losses(label, held, plain.losses)
            sharding = sharding_of(read_settings(settings_file(name)), world)
            rows.append(peak_row(label, held, sharding, shape))
    return rows


def settings_file(name: str) -> str:
    return str(CONF / "deepspeed" / f"{name}.json")


def check_losses(label: str, held: Iterable[Held], wanted: Sequence[float]) -> None:
    """Every rank's losses against those of one process.

    Raises:
        AssertionError: if they differ by more than fp32's rounding.
    """
    for number, rank in enumerate(held):
        close = torch.allclose(torch.tensor(rank.losses), torch.tensor(wanted), rtol=TOLERANCE, atol=0)
        assert close, f"{label}, rank {number}: losses {rank.losses}, without DeepSpeed {list(wanted)}"


def peak_row(label: str, held: Sequence[Held], sharding: Sharding, shape: Shape) -> Row:
    """The samples are the ranks' peaks. The note gives the tensors of the rank that holds the most."""
    device = Device("cpu", 0)
    state = sharding.state_bytes(shape.parameters, device)
    activations = sum(training_step(shape, LENGTH, False, device))
    most = max(held, key=lambda rank: rank.weights + rank.gradients + rank.optimizer)
    tensors = (most.weights, most.gradients, most.optimizer)
    note = (
        f"MB of tensors {parts(tensors)}; schedule {parts(state)}, and {activations / 1e6:.0f} of activations"
    )
    if sharding.offload:
        note += "; on a CPU offload moves nothing"
    target = round((sum(state) + activations) / 1e9, 3)
    peaks = [rank.peak / 1e9 for rank in held]
    return row(f"peak of a rank, {label}", peaks, target, at_most=True, unit=" GB", note=note)


def parts(sizes: Sequence[int]) -> str:
    """`480 (120 weights, 120 gradients, 240 optimizer)`, megabytes."""
    names = ("weights", "gradients", "optimizer")
    named = (f"{size / 1e6:.0f} {name}" for size, name in zip(sizes, names, strict=True))
    return f"{sum(sizes) / 1e6:.0f} ({', '.join(named)})"


def train_group(settings: str | None, world: int, model: ScratchModel) -> list[Held]:
    """Train in fresh processes; return what each rank held. Without settings, on the plain torch engine."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        given = (world, port, settings, model, Path(folder))
        multiprocessing.start_processes(work, given, nprocs=world, start_method="forkserver")
        files = [Path(folder) / f"{rank}.json" for rank in range(world)]
        return [Held(**json.loads(file.read_text())) for file in files]


def work(rank: int, world: int, port: int, settings: str | None, model: ScratchModel, folder: Path) -> None:
    """Train as one rank and write what it held to its file."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train(SMALL, settings)
    gc.collect()
    before = memory_bytes("VmRSS")
    losses, tensors = train(model, settings)
    held = Held(losses, memory_bytes("VmHWM") - before, *tensors)
    (folder / f"{rank}.json").write_text(json.dumps(asdict(held)))


def train(model: ScratchModel, settings: str | None) -> tuple[list[float], list[int]]:
    """A few steps on random tokens, each rank on its share of a batch.

    Returns: the loss of each step over all ranks, and bytes of weights, gradients and optimizer state.
    """
    config = load_config(CONF / "quickstart.yaml", OVERRIDES)
    schedule = Schedule(config.train, config.train, STEPS)
    scratch = build_scratch(model, word_tokenizer(), 0).train()
    engine: Engine
    if settings is None:
        engine = TorchEngine(
            scratch, device=torch.device("cpu"), weight_decay=schedule.weight_decay, clip=schedule.clip,
            accumulation=schedule.micro_batches, bfloat16=False,
        )  # fmt: skip
    else:
        from jobs.executors.deepspeed_engine import deepspeed_engine

        engine = deepspeed_engine(config, read_settings(settings_file(settings)))(scratch, schedule)
    tokens = torch.randint(VOCABULARY, (STEPS, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    losses, sizes = [], []
    for batch in tokens:
        share = batch[engine.rank :: engine.world_size]
        total = torch.zeros(())
        for sequence in share:
            loss = next_token_loss(engine.model, sequence[None])
            engine.backward(loss)
            total += loss.detach() / len(share)
        losses.append(float(engine.mean(total)))
        sizes = storage_bytes(*tensors_of(engine))
        engine.step(LEARNING_RATE)
    return losses, sizes


def tensors_of(engine: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, gradients and optimizer state of this rank, without buffers for communication."""
    if isinstance(engine, TorchEngine):
        model, optimizer, zero = engine.model, engine.optimizer, None
    elif engine.stage == 0:
        model, optimizer, zero = engine.engine.module, engine.engine.optimizer, None
    else:
        zero = engine.engine.optimizer
        model, optimizer = engine.engine.module, zero.optimizer
    parameters = list(model.parameters())
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    gradients = [tensor.grad for tensor in (*parameters, *masters)]
    if zero is not None:
        gradients += chain(*(part or () for part in zero.averaged_gradients.values()))
        gradients.append(getattr(zero, "grad_partitions_flat_buffer", None))  # stage 3
    state = [
        value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)
    ]
    return weights, [gradient for gradient in gradients if gradient is not None], masters + state


def storage_bytes(*groups: Iterable[Tensor]) -> list[int]:
    """Bytes of each group's storages; a storage that several groups share counts for the first."""
    seen: set[int] = set()
    sizes = []
    for group in groups:
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in group
        }
        sizes.append(sum(size for place, size in storages.items() if place not in seen))
        seen |= set(storages)
    return sizes


def memory_bytes(field: str) -> int:
    """This process's resident memory: VmRSS is that of now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
