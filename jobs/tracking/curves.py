"""The curves of training in MLflow: a run for each model, its weights below the stage where asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from jobs.tracking.store import OTHERS_S, Point, Run, Store, now_ms
from jobs.tracking.writer import Writer


class Curves:
    """One model: its metrics file, and what of it is on the way to MLflow.

    A step goes once, however often the file is rewritten. A model that was mirrored whole before, by the name
    of its artifact folder, is left alone. The run is FINISHED when all of it is there, weights included.
    """

    def __init__(
        self, store: Store, writer: Writer, lock: FileLock, stage_run: Run, name: str, path: Path
    ) -> None:
        self.store, self.writer, self.lock = store, writer, lock
        self.stage_run, self.name, self.path = stage_run, name, path
        self.piece = path.parent.name
        self.logged: set[float] = set()
        self.run: Run | None = None
        self.elsewhere = False  # mirrored before, or by another process: known in the writer's thread

    def poll(self, wait: bool = False) -> None:
        """Queue the rows that are new. `wait`: for another process that mirrors this model at present."""
        from pipeline.train.loop import read_metrics  # imports torch

        rows = [row for row in read_metrics(self.path) if row["step"] not in self.logged]
        points = [
            (key, value, int(row["step"])) for row in rows for key, value in row.items() if key != "step"
        ]
        if points:
            self._begin(wait)
            self._put("curves", partial(self._log, points, now_ms()))
        self.logged |= {row["step"] for row in rows}

    def upload(self, folder: str, wait: bool = False) -> None:
        """Queue the model's weights as artifacts of the stage's run, below `folder`/name."""
        self._begin(wait)
        model = self.path.parent / "model"
        for file in sorted(file for file in model.rglob("*") if file.is_file()):
            below = Path(folder) / self.name / file.parent.relative_to(model)
            self._put(file.name, partial(self._upload, file, str(below)), repeatable=True)

    def close(self, status: str) -> None:
        """Queue the end of the run."""
        if self.run:
            self._put("the end", partial(self._end, self.run, status, now_ms()))
            self.writer.put(f"lock of {self.piece}", self.lock.release)

    def _put(self, what: str, action: Callable[[], None], repeatable: bool = False) -> None:
        self.writer.put(f"{what} of {self.name}", action, repeatable)

    def _begin(self, wait: bool) -> None:
        if self.run is None:
            self.run = Run(self.name, {"stage": "curves", "artifact": self.piece}, self.stage_run)
            self._put("the run", partial(self._make, self.run, wait))

    # ── in the writer's thread ────────────────────────────────────────────────────────────────────

    def _make(self, run: Run, wait: bool) -> None:
        try:
            if not self.lock.is_locked:
                self.lock.acquire(timeout=OTHERS_S if wait else 0)
        except Timeout:
            if wait:
                raise
            self.elsewhere = True
            return
        if not run.asked:
            self.elsewhere = bool(
                self.store.whole(f"tags.stage = 'curves' and tags.artifact = '{self.piece}'")
            )
        if not self.elsewhere:
            self.store.make(run)
            self.store.log(run, {"model": self.name}, (), run.began_ms)

    def _log(self, points: Sequence[Point], at_ms: int) -> None:
        if not self.elsewhere:
            assert self.run
            self.store.log(self.run, {}, points, at_ms)

    def _upload(self, file: Path, folder: str) -> None:
        if not self.elsewhere:
            self.store.upload(self.stage_run, file, folder)

    def _end(self, run: Run, status: str, at_ms: int) -> None:
        if not self.elsewhere:
            self.store.end(run, status, at_ms)
