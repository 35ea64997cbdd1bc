"""State copied to host memory: whole, and in few copies."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miles_fast.training.host_copy import HostCopy


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten.copy_.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_lies_side_by_side_is_one_copy_and_nothing_else_is(device):
    weights, moments = (torch.randn(60, device=device) for _ in range(2))
    whole = torch.randn(4, 5, device=device)
    given = {"last": weights[30:60], "a": weights[0:10], "b": weights[10:12].view(2, 1)}
    given |= {"moment": moments[10:30], "other": moments[31:40], "whole": whole}  # two gaps
    copy = HostCopy(torch.device(device))
    with Copies() as seen:
        found = copy.take(given)
    copy.wait()
    assert seen.count == 5  # weights to 12, from 30; moments to 30, from 31; the last tensor
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].device.type == "cpu" and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor.cpu())
    with Copies() as seen:
        copy.take({"a": weights, "b": weights[:30]})  # one within the other
    assert seen.count == 2
