"""Faults: each test names its row of the table F1-F12 and the figure that it found.

MILES_FAST_FAULTS=full runs them at the size that `make faults` reports; CI runs a small one.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
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


class Run:
    """Processes of one run, their exit codes and what they said."""

    def __init__(self, arguments: list[str], ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for number in range(ranks):
            environment = {
                **os.environ,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            command = [sys.executable, str(SCRIPT), *arguments]
            self.processes.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            )

    def wait(self, timeout: float = 240, besides: tuple[int, ...] = ()) -> list[int | None]:
        """Exit codes; processes of ranks `besides` are not waited for, and killed then."""
        limit = time.monotonic() + timeout
        try:
            for number, process in enumerate(self.processes):
                if number not in besides:
                    process.wait(max(limit - time.monotonic(), 0.1))
        finally:
            codes = [process.poll() for process in self.processes]
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
            self.errors = [process.communicate()[1].decode() for process in self.processes]
        return codes


@pytest.fixture
def start(root):
    """Start a tiny run: `start(folder, ranks, '--steps', '4', ...)`."""

    def run(folder: Path, ranks: int, *arguments: str) -> Run:
        return Run([str(root), str(folder), *arguments], ranks)

    return run
