"""Splits that are drawn by document: a hash of its text and the seed places it on [0, 1).

So a document keeps its split whatever else is in the set, and copies share one.
"""

from __future__ import annotations

import hashlib
from abc import ABC
from typing import TypeVar

from pipeline.config.data import DrawnSource, Split
from pipeline.data.documents import Reader
from pipeline.errors import BadData

DrawnT = TypeVar("DrawnT", bound=DrawnSource)


class DrawnReader(Reader[DrawnT], ABC):
    """A reader of a source whose config has fractions."""

    def split(self, text: str) -> Split:
        """The split of a document, among those in `use`."""
        use = self.source.use
        if len(use) == 1:
            return use[0]
        point = int.from_bytes(hashlib.sha256(f"{self.seed}\n{text}".encode()).digest()[:8]) / 2**64
        test, validation = self.fractions
        if "train" not in use:
            if test + validation == 0:
                raise BadData(f"source {self.source.name!r}: its fractions are 0, and it feeds no training")
            test = test / (test + validation)
            return "test" if point < test else "validation"
        if point < test:
            return "test"
        return "validation" if point < test + validation else "train"

    @property
    def fractions(self) -> tuple[float, float]:
        """The shares of the documents that are for test and for validation."""
        source = self.source
        return (
            source.test_fraction if "test" in source.use else 0.0,
            source.validation_fraction if "validation" in source.use else 0.0,
        )

    @property
    def training_share(self) -> float:
        test, validation = self.fractions
        return 1.0 - validation - test
