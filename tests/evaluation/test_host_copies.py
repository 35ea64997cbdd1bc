"""Copies to the host: all of them, in order, and on a GPU behind the work that makes them."""

import pytest
import torch

from miles_fast.evaluation.host_copies import AHEAD, on_host


def test_every_tensor_arrives_in_order_and_at_once_on_the_cpu():
    made = []

    def make():
        for number in range(4):
            made.append(number)
            yield number, torch.full((2,), float(number))

    arriving = on_host(make())
    assert next(arriving)[0] == 0 and made == [0]
    assert [(n, t.tolist()) for n, t in arriving] == [(n, [float(n)] * 2) for n in (1, 2, 3)]


@pytest.mark.gpu
def test_on_a_gpu_the_host_runs_ahead_and_the_values_are_those_of_finished_work():
    made = []

    def make():
        for number in range(6):
            x = torch.full((1024, 1024), 1.0, device="cuda")
            for _ in range(50):
                x = x @ x / 1024
            made.append(number)
            yield number, x[0, :3] * number

    arriving = on_host(make())
    first, values = next(arriving)
    assert first == 0 and len(made) == AHEAD + 1 and not values.is_cuda
    assert [(n, t.tolist()) for n, t in arriving] == [(n, [float(n)] * 3) for n in range(1, 6)]
