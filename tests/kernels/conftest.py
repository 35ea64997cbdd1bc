import pytest
import torch

from miles_fast.kernels.dispatch import has_quack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["quack", "other"])
def backend(request, monkeypatch):
    """Each of the two that a Hopper GPU has: quack, and Triton or torch."""
    if request.param == "other":
        monkeypatch.setattr("miles_fast.kernels.dispatch._QUACK", False)
    elif not has_quack(torch.device(DEVICE)):
        pytest.skip("needs a Hopper GPU and quack-kernels")
    return request.param
