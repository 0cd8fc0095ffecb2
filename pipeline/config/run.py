"""Where a run works and who mirrors it."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from pipeline.config.group import Group

# Kinds of Ray workers: data tasks, the labelling target, training workers, drafters that replay, and the
# target with its drafters, timed.
Work = Literal["prepare", "teach", "train", "replay", "measure"]


class Resources(Group):
    """What one Ray worker of a kind of work asks for; what is not given is as for all work."""

    cpus: float | None = Field(None, ge=0, description="CPUs, and its torch threads; default: cpus_per_task")
    gpus: float | None = Field(
        None, ge=0, description="GPUs; a part of one is shared with others; default: gpus_per_task"
    )
    memory_gb: float | None = Field(None, gt=0, description="GB (10^9) of memory; default: not reserved")

    @property
    def threads(self) -> int:
        """Torch threads of the worker."""
        return max(1, int(self.cpus or 1))

    @model_validator(mode="after")
    def _whole_gpus(self) -> Resources:
        if self.gpus and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus is {self.gpus:g}: more than one GPU is a whole number of them")
        return self


class Run(Group):
    """Where and on what it runs. Of this only device and kernels matter to a result: a sweep's wall clock."""

    executor: Literal["ray", "inline"] = "ray"
    ray_address: str | None = Field(
        None, description='cluster to join; "local" or empty starts one, unless inside a Ray job'
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_task: float = Field(1, ge=0, description="CPUs a Ray task or actor asks for; its torch threads")
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto", description="auto: Triton's on a GPU, torch elsewhere"
    )
    gpus_per_task: float = Field(
        0,
        ge=0,
        description="GPUs a Ray actor or training worker asks for; tasks that prepare data ask for none",
    )
    resources: dict[Work, Resources] = Field(
        default={}, description="by kind of work, where it asks for something else than that"
    )

    stall_minutes: float = Field(
        120,
        gt=0,
        description="a stage on Ray in which nothing has ended for so long is given up, as a worker may "
        "hang; the same command resumes",
    )

    def needs(self, work: Work) -> Resources:
        """What one worker asks for, every default filled in but that of the memory."""
        given = self.resources.get(work, Resources())
        gpus = 0.0 if work == "prepare" else self.gpus_per_task
        return Resources(
            cpus=self.cpus_per_task if given.cpus is None else given.cpus,
            gpus=gpus if given.gpus is None else given.gpus,
            memory_gb=given.memory_gb,
        )

    def at_once(self, work: Work, workers: int, device: str) -> int:
        """Of so many workers those on one device: of a CPU all, of a GPU as many as their shares allow."""
        if self.executor == "inline":
            return 1
        share = self.needs(work).gpus or 0.0
        if device == "cpu":
            return workers
        return min(workers, int(1 / share) if 0 < share < 1 else 1)

    @model_validator(mode="after")
    def _device_fits(self) -> Run:
        if self.kernels == "triton" and self.device == "cpu":
            raise ValueError("kernels is triton, which needs a GPU, but device is cpu")
        for work in get_args(Work):
            field = (
                "gpus_per_task"
                if self.resources.get(work, Resources()).gpus is None
                else (f"resources.{work}.gpus")
            )
            gpus = self.needs(work).gpus or 0.0
            if gpus and self.device == "cpu":
                raise ValueError(f"{field} asks for GPUs, but device is cpu")
            if work == "prepare" or self.executor == "inline":
                continue
            if self.device == "cuda" and not gpus:
                raise ValueError(f"device is cuda, but {field} is 0: Ray workers would share GPUs unasked")
            if work == "train" and gpus != int(gpus):
                raise ValueError(f"{field} is {gpus:g}: a training worker needs a whole GPU, or none")
        return self


class Tracking(Group):
    uri: str | None = Field(None, description="MLflow tracking URI; default: sqlite in the storage folder")
    experiment: str = Field("budgetdraft", min_length=1)
    enabled: bool = True
    wait_s: float = Field(
        300, ge=0, description="seconds that the end of a run waits for a store that takes nothing"
    )
