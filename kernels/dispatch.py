"""Where an op runs (Triton, its plain-PyTorch reference, or quack) and with which launch parameters.

Triton runs on CUDA tensors, and on CPU tensors when TRITON_INTERPRET=1 was set before this module was
imported (Triton reads the variable when a kernel is decorated). Everything else, float64 included, is
answered by the reference. Platforms without Triton (macOS, Windows) import the ops all the same and always
get the reference. Matrix products of halves are quack's on Hopper GPUs, where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    triton = tl = None
    if torch.version.cuda is not None:
        logging.getLogger(__name__).warning(
            "triton cannot be imported (%s): miles_fast.kernels runs its slower references", missing
        )

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
_QUACK = (
    importlib.util.find_spec("quack") is not None
    and not INTERPRETED
    and os.environ.get("MILES_FAST_QUACK") != "0"
)

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jit(kernel):
    """`triton.jit`, or the bare function where Triton is not importable (it is then never launched)."""
    return kernel if triton is None else triton.jit(kernel)


# The interpreter keeps a bfloat16 as its bits, and its tl.dot multiplies the bits.
_WIDENS = tl and tl.constexpr(INTERPRETED)


@jit
def product(a, b, total):
    """tl.dot added to `total` (None: nothing), in the tensors' own precision, under the interpreter too."""
    if _WIDENS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether an op on these floating-point tensors is launched as a Triton kernel."""
    return (
        triton is not None
        and (INTERPRETED or tensors[0].is_cuda)
        and all(tensor.dtype in _TRITON_DTYPES for tensor in tensors)
    )


def has_quack(device: torch.device) -> bool:
    """Whether this is a GPU that quack computes on, and quack is installed."""
    return _QUACK and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _quack_products() -> ModuleType | None:
    try:
        from miles_fast.kernels import quack_products
    except Exception as failure:  # of whatever quack or its compiler finds amiss
        logging.getLogger(__name__).warning("quack cannot be imported, others take its products: %s", failure)
        return None
    return quack_products


def quack_for(device: torch.device) -> ModuleType | None:
    """kernels/quack_products.py where it can compute, else None: within an op: no compiler traces it."""
    return _quack_products() if has_quack(device) else None


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many the tensor's GPU has; 2 of a CPU tensor, so that the interpreter shares the work out too."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def launch_parameters(table: dict[int, tuple[int, int]], width: int) -> tuple[int, int, int]:
    """(rows per program, columns per program, warps per program) for rows of `width` numbers.

    The columns are `width` rounded up to a power of two; `table` maps them to measured (rows, warps). A width
    that nobody measured gets about 4096 numbers a program over 4 warps.
    """
    block_width = triton.next_power_of_2(width)
    rows, num_warps = table.get(block_width) or (max(1, min(64, 4096 // block_width)), 4)
    return rows, block_width, num_warps


def with_unit_stride(rows: torch.Tensor) -> torch.Tensor:
    """The tensor itself when its rows are contiguous (kernels read the others by stride), or a copy."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def for_bulk_copies(rows: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it is not contiguous or does not begin at a multiple of 16 bytes."""
    rows = rows.contiguous()
    # DeepSpeed's flat buffers hold weights behind others of any size.
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
