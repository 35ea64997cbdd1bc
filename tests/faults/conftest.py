"""Faults: each test names its row of the table F1-F12 and the figure that it found.

MILES_FAST_FAULTS=full runs them at the size that `make faults` reports; CI runs a small one.
"""

import os
from pathlib import Path

import pytest
from fork_server import CPU, Ranks
from tiny import write_data

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="session")
def full() -> bool:
    return os.environ.get("MILES_FAST_FAULTS") == "full"


@pytest.fixture
def finding(record_property):
    """Call it with the fault's number and what was found."""

    def record(fault: str, figure: str) -> None:
        record_property("fault", fault)
        record_property("figure", figure)

    return record


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    write_data(place)
    return place


@pytest.fixture
def start(root):
    """Start a tiny run: `start(folder, ranks, '--steps', '4', ...)`, on CPUs but for `env={}`."""

    def run(folder: Path, ranks: int, *arguments: str, env: dict[str, str] = CPU) -> Ranks:
        return Ranks(ranks, str(SCRIPT), str(root), str(folder), *arguments, env=env)

    return run
