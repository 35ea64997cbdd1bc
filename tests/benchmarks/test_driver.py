"""The GPUs by the driver's own numbers: which ones are measured on, and who else is on them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 2**30


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import driver

    return driver


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [(None, [0, 1], "0,1"), ("2,3", [0, 1], "2,3"), ("2, 3", [1], "3"), ("5", [0], "5")],
)
def test_scaling_runs_on_the_gpus_that_are_visible(monkeypatch, driver, visible, gpus, expected):
    """DeepSpeed's --include and --num_gpus count all of the host's, where other runs may be."""
    import scaling

    begun = []
    monkeypatch.setattr(scaling.subprocess, "Popen", lambda command: begun.append(command))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible.split(",")) if visible else 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    scaling._launch(gpus)
    assert begun[0][begun[0].index("--include") + 1] == f"localhost:{expected}"
    assert "--num_gpus" not in begun[0]


def test_names_that_the_launcher_cannot_read_are_refused(monkeypatch, driver):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=GPU-8932.*nvidia-smi -L"):
        driver.numbers_on_host()


def test_others_are_seen_on_the_gpus_that_are_asked_for(monkeypatch, driver):
    used = [0.6, 72.1, 3.0]
    memory = SimpleNamespace(nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=used[gpu] * GIB))
    monkeypatch.setitem(sys.modules, "pynvml", memory)
    monkeypatch.setattr(driver, "driver_handle", lambda gpu: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(used))
    assert driver.held_by_others(1) == {}
    assert driver.held_by_others(2) == {1: pytest.approx(72.1)}
    assert list(driver.held_by_others(8)) == [1, 2]


@pytest.mark.gpu
def test_memory_that_is_taken_is_seen(driver):
    pytest.importorskip("pynvml")
    gpu = torch.cuda.current_device()
    taken = torch.zeros(3 * GIB, dtype=torch.uint8, device="cuda")
    assert driver.held_by_others(gpu + 1)[gpu] > taken.numel() / GIB
