"""The meter: how often torch's allocator found no memory, and the warning of it."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config

from miles_fast.data.batches import Quarantine
from miles_fast.data.order import Share
from miles_fast.training.memory_report import warn_of_full_memory
from miles_fast.training.meter import Meter
from miles_fast.training.objective import Losses

GPU = torch.device("cuda", 0)


def retries_of(meter, device="cpu"):
    losses = Losses(*torch.ones(5, device=device))
    engine = SimpleNamespace(get_lr=lambda: [0.1])
    record = meter.record(losses, torch.ones(()), engine, Quarantine(None))
    assert record["loss"] == record["target_std"] == 1
    return record.get("allocation_retries")


def test_a_record_counts_retries_since_the_one_before(tmp_path, monkeypatch):
    counts = iter([3, 3, 10])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"num_alloc_retries": next(counts)})
    meter = Meter(tiny_config(tmp_path), Share(batch=2), GPU)
    assert [retries_of(meter) for _ in range(3)] == [3, 0, 7]
    assert retries_of(Meter(tiny_config(tmp_path), Share(batch=2), torch.device("cpu"))) is None


@pytest.mark.gpu
def test_memory_that_had_to_be_emptied_first_is_counted(tmp_path, limit_memory):
    device = torch.device("cuda", torch.cuda.current_device())
    meter = Meter(tiny_config(tmp_path), Share(batch=2), device)
    retries_of(meter, device)
    limit_memory(2**27)
    torch.empty(2**26, dtype=torch.uint8, device=device)  # kept by torch, too small for the next
    assert retries_of(meter, device) == 0
    torch.empty(3 * 2**25, dtype=torch.uint8, device=device)
    assert retries_of(meter, device) == 1


def test_full_memory_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_full_memory(0)
        assert not caplog.text
        warn_of_full_memory(7)
    assert "7 times" in caplog.text and "train_micro_batch_size_per_gpu" in caplog.text
