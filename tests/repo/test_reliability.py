"""The page about reliability is what the committed files of measurements give."""

from __future__ import annotations

from dataclasses import asdict

from tests.helpers.reliability import FAULTS, PAGE, SOAK, page, read
from tests.soak.pipelines import Soak


def test_the_page_is_the_measurements() -> None:
    assert page(read(FAULTS), read(SOAK)) == PAGE.read_text(encoding="utf-8")


def test_what_was_not_as_expected_is_on_the_page() -> None:
    soak = Soak(seed=7, minutes=2, provenance={"cpu": "a CPU"}, pipelines=2, whole=1, lost=3)
    soak.unexpected = ["soak-2: exit code 1 after ['kill -9 of a node']"]
    soak.driver_bytes, soak.driver_files = [2**20, 9 * 2**20, 2**21], [5, 100, 6]
    told = page(None, asdict(soak))
    assert "exit code 1 after" in told and "SEED=7" in told
    assert "| pieces lost, doubled or different | 3 |" in told
    assert "first and last third | 1 and 2 MiB |" in told and "first and last third | 5 and 6 |" in told
    assert not soak.good
