"""The fields of `registry`: whether a finished pipeline registers a drafter, and as what."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from pipeline.config.group import Group


class Registry(Group):
    """A drafter of this pipeline becomes a version of a model in MLflow's model registry."""

    model: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200, description="name of the registered model"
    )
    drafter: str | None = Field(
        None, description="which drafter, NAME or NAME~SEED; default: the last one that is evaluated"
    )

    def check(self, evaluated: Sequence[str], tracked: bool) -> None:
        """Raises ValueError where it asks for what the rest of the config does not give."""
        if not tracked:
            raise ValueError("registry needs MLflow: set tracking.enabled: true, or leave registry out")
        if self.drafter is not None and self.drafter not in evaluated:
            raise ValueError(
                f"registry.drafter: {self.drafter!r} is not among the drafters that are evaluated "
                f"{list(evaluated)}"
            )
