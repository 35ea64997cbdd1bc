"""Set before any import of the package: kernels are interpreted where there is no GPU."""

import gc
import logging
import os
import sys
from pathlib import Path

# The tests' models are tiny: on two cores a second thread took them a third longer, and what they start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count()
    for item in items:
        for name, needed in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(name) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"{name}: needs {needed} CUDA GPU(s)"))


@pytest.fixture(autouse=True)
def log_as_imported():
    """A program that a test calls sends the log to stderr alone; the next test finds it as it was."""
    yield
    log = logging.getLogger("miles_fast")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def limit_memory():
    """Called with bytes, it leaves the GPU so many: what torch holds but does not use is taken as well."""
    device, taken = torch.cuda.current_device(), []

    def limit(room: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        mine = (torch.cuda.current_stream().cuda_stream, (0, 0))
        segments = [s for s in torch.cuda.memory_snapshot() if (s["stream"], s["segment_pool_id"]) == mine]
        unused = [block["size"] for s in segments for block in s["blocks"] if block["state"] == "inactive"]
        for size in sorted(unused, reverse=True):
            if size > 2**20:  # less would come from torch's small segments
                taken.append(torch.empty(size, dtype=torch.uint8, device=device))
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total, device)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and weights, beside the checkout; tests that need it skip without it."""
    place = Path(os.environ.get("MILES_FAST_SHARED", ROOT.parent / "shared"))
    if not (place / "clips" / "manifest.json").is_file():
        pytest.skip(f"{place}/clips: real clips are not here")
    return place
