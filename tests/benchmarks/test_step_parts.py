"""Where a profiled step's GPU idles."""

from pathlib import Path
from types import SimpleNamespace

import torch


def profile(*kernels):
    return SimpleNamespace(
        events=lambda: [
            SimpleNamespace(
                name=name,
                device_type=torch.autograd.DeviceType.CUDA,
                time_range=SimpleNamespace(start=start, end=end),
            )
            for start, end, name in kernels
        ]
    )


def test_idle_is_counted_once_and_without_what_decodes_beside_the_step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from step_parts import idle_table

    recorded = profile(
        (0, 1000, "nvjet_a"),
        (500, 3000, "attend_kernel"),  # longer than what began before it
        (900, 1200, "nvjet_b"),
        (4000, 4500, "void nvjpeg::rgba2rgb"),
        (5000, 5100, "Memcpy HtoD (Pinned -> Device)"),
        (7000, 8000, "adam"),
        (0, 9000, "ProfilerStep#1"),
    )
    lines = [line.split() for line in idle_table(recorded, 2).splitlines()]
    assert lines[0] == ["idle", "1.70", "ms", "2", "gaps"]
    assert [line[0] for line in lines[1:4]] == ["1.90", "1.00", "0.50"]
    assert lines[4] == ["idle,", "or", "decoding", "alone", "2.00", "ms", "0", "gaps"]
    assert lines[5][:2] == ["4.00", "ms"] and lines[5][2:] == ["attend_kernel", "->", "adam"]
