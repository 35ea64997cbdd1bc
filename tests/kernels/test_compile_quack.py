"""quack's kernels compile for sm_90 at the trainer's width, without a GPU: no spills.

In a process of its own: quack chooses the GPU by environment variables, and here none is to answer for it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WIDTH, HIDDEN = 768, 3072


def _compile():
    """Call every product on CPU tensors, up to the launch."""
    import torch
    from quack.cache.async_compile import _install_gpu_blind_device_attrs
    from quack.epilogue import frontend
    from quack.gemm_runtime import host

    from miles_fast.kernels import quack_products

    _install_gpu_blind_device_attrs()
    host.get_max_active_clusters = lambda *_, **__: 1
    frontend.run_gemm_epi_plan = lambda *_, **__: None
    x, weight, hidden = (torch.zeros(256, width, dtype=torch.bfloat16) for width in (WIDTH, WIDTH, HIDDEN))
    first = torch.zeros(HIDDEN, WIDTH, dtype=torch.bfloat16)
    bias = first[:, 0].contiguous()
    quack_products.product(x, first.T, bias, None)
    quack_products.product(x, first.T, bias, hidden)
    quack_products.product(hidden, first, None, None)
    for keep in (False, True):
        quack_products.linear_gelu(x, first, bias, keep)
    quack_products.product_slope(x, first.T.contiguous(), hidden)
    eight = torch.float8_e4m3fn
    x8, first8, hidden8 = x.to(eight), first.to(eight), hidden.to(eight)
    rows, columns = torch.ones(len(x)), torch.ones(HIDDEN)
    quack_products.scaled_product(x8, rows, first8, columns, bias, None)
    second8 = first8.T.contiguous()
    quack_products.scaled_product(hidden8, rows, second8, columns[:WIDTH], bias[:WIDTH], x)
    for keep in (False, True):
        quack_products.scaled_linear_gelu(x8, first8, bias, rows, columns, rows, keep)


@pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="needs quack-kernels")
def test_every_product_compiles_for_sm90_without_spills(tmp_path):
    target = {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | target | {"QUACK_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = sorted(tmp_path.rglob("*.o"))
    assert len(compiled) == 10
    for number, file in enumerate(compiled):
        held = file.read_bytes()
        cubin = tmp_path / f"{number}.cubin"
        cubin.write_bytes(held[held.index(b"\x7fELF", 4) :])  # the GPU's program, within the host's
        command = [CUOBJDUMP, "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


if __name__ == "__main__":
    _compile()
