"""Tests of faults: each is tried `--tries` times and counted; `make test-faults` writes down what came of it.

A test names its fault with `@pytest.mark.fault("…")`, breaks a real process or file, runs the same command
again, and adds to `tally.lost` the pieces of work that are missing or doubled beside a run without the fault.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.helpers import reliability
from tests.helpers.fault_toy import Tally, Toy, make_toy


@dataclass
class Fault:
    """One line of the table."""

    fault: str
    tries: int = 0
    survived: int = 0
    lost: int = 0


TALLY = pytest.StashKey[Tally]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    counted = Tally()
    request.node.stash[TALLY] = counted
    return counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """What a try came to goes with its report, which may come from another process."""
    report = yield
    marker = item.get_closest_marker("fault")
    if marker and (report.when == "call" or (report.when == "setup" and report.failed)):
        report.user_properties += [("fault", marker.args[0]), ("lost", item.stash.get(TALLY, Tally()).lost)]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Counter(config))


class Counter:
    """Adds up the reports of all processes in the one that started them, and writes the page in the end.

    Which process is done first is chance, so that new lines are in the order of the tests. A fault that was
    not tried keeps the line of the last run that did.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.faults: dict[tuple[str, int, str], Fault] = {}  # by file, line and name

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties)
        if "fault" in told:
            file, number, _ = report.location
            name = str(told["fault"])
            line = self.faults.setdefault((file, number or 0, name), Fault(name))
            if not report.skipped:
                line.tries += 1
                line.survived += report.passed
                line.lost += int(str(told["lost"]))

    def pytest_sessionfinish(self) -> None:
        if self.faults and self.config.getoption("faults_page"):
            lines = {line["fault"]: line for line in reliability.read(reliability.FAULTS) or []}
            lines |= {line.fault: asdict(line) for _, line in sorted(self.faults.items()) if line.tries}
            reliability.FAULTS.write_text(json.dumps([*lines.values()], indent=2) + "\n", encoding="utf-8")
            reliability.write_page()


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A pipeline of tiny models that runs in seconds, and what it gives without a fault."""
    return make_toy(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of so many KiB; the same folder again with another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        option = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={kib}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All first tries come before all second ones, so that an interrupted run has tried every fault."""

    def attempt(item: pytest.Item) -> int:
        call = getattr(item, "callspec", None)  # a test without parameters has none
        return int(call.params.get("attempt", 0)) if call else 0

    items.sort(key=attempt)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of a fault once for each try."""
    if metafunc.definition.get_closest_marker("fault") and "attempt" not in metafunc.fixturenames:
        metafunc.fixturenames.append("attempt")
    if "attempt" in metafunc.fixturenames:
        metafunc.parametrize("attempt", range(metafunc.config.getoption("tries")))
