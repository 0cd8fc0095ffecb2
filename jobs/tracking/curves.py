"""The curves of training in MLflow: a run for each model; its weights go to the stage's run if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from jobs.tracking.store import Put, Run, Store, now_ms, put_folder
from pipeline.observe.training import read_metrics


class Curves:
    """One model: its metrics file, and the steps of it that were queued for MLflow.

    A step is queued once, however often the file is rewritten. A model is known by the name of its artifact
    folder; one that was mirrored whole before is left alone. The run is FINISHED when all of it is there,
    weights included.
    """

    def __init__(self, put: Put, stage_run: Run, name: str, file: Path) -> None:
        self.put, self.stage_run, self.name, self.file = put, stage_run, name, file
        self.piece = file.parent.name
        self.logged: set[float] = set()
        self.run: Run | None = None
        self.there = False  # mirrored whole before: known in the writer's thread

    def log(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Queue the rows that are new."""
        new = [row for row in rows if row["step"] not in self.logged]
        points = [
            (key, value, int(row["step"])) for row in new for key, value in row.items() if key != "step"
        ]
        if points:
            run = self._begun()
            self._put("curves", partial(Store.log, run=run, points=points, at_ms=now_ms()))
        self.logged |= {row["step"] for row in new}

    def finish(self, status: str, upload_to: str | None) -> None:
        """Queue what is left: the rest of the file; if the model is FINISHED, its weights as artifacts of the
        stage's run below `upload_to`/name; the end of the run."""
        self.log(read_metrics(self.file))
        if upload_to and status == "FINISHED":
            self._begun()
            put_folder(self._put, self.stage_run, self.file.parent / "model", Path(upload_to) / self.name)
        if self.run:
            self._put("the end", partial(Store.end, run=self.run, status=status, at_ms=now_ms()))
            self.put(f"lock of {self.piece}", partial(Store.release, piece=self.piece))

    def _begun(self) -> Run:
        if self.run is None:
            self.run = Run(self.name, {"stage": "curves", "artifact": self.piece}, self.stage_run)
            self._put("the run", partial(self._make, run=self.run))
        return self.run

    def _put(self, what: str, action: Callable[[Store], object], repeatable: bool = False) -> None:
        def unless_there(store: Store) -> None:
            if not self.there:
                action(store)

        self.put(f"{what} of {self.name}", unless_there, repeatable)

    def _make(self, store: Store, run: Run) -> None:
        if not run.asked:
            query = f"tags.stage = 'curves' and tags.artifact = '{self.piece}'"
            self.there = bool(store.claim(self.piece, query))
        if not self.there:
            store.make(run)
            store.log(run, {"model": self.name}, at_ms=run.began_ms)
