"""The first product of an MLP with its GELU, computed where the product still lies in registers.

    hidden[m, d] = sum_k x[m, k] weight[d, k] + bias[d]
    active[m, d] = gelu(hidden[m, d]),   slope[m, d] = gelu'(hidden[m, d])

Out of a pass of its own, GELU reads and writes what the product has just written: 0.41 of 1.10 ms for the MLP
of ViT-B at 128 clips of 4 frames. The slope is for backward alone, and made only when that is wanted: with it
backward's end is one multiplication, while hidden itself would have its exponentials computed there.
No history: the gradients are kernels/mlp.py's.

`scaled_linear_gelu` is the same of 8-bit floats, to 8-bit floats (kernels/fp8_mlp.py).

Letters: M rows, K numbers in, D numbers out.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from miles_fast.kernels.biased_gelu import gelu_of, gelu_slope
from miles_fast.kernels.dispatch import (
    INTERPRETED,
    for_bulk_copies,
    jit,
    multiprocessors,
    product,
    quack_for,
    runs_triton,
    tl,
    triton,
)

# D rounded up to a power of two -> (rows, columns and depth of a tile, slices that its end is done in, warps,
# stages). The fastest of those that `python benchmarks/micro.py --op mlp --sweep` tries, on an H100
# at 128 clips of 785 tokens, 768 to 3072, bf16. Widths that are not named get the same.
LAUNCH_FORWARD = {4096: (128, 256, 64, 2, 8, 4)}
LAUNCH_SCALED = (128, 256, 128, 2, 8, 3)  # of four tried at the same shape


@jit
def _linear_gelu_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    out_scale_ptr,
    slope_desc,
    active_desc,
    out_desc,
    M,
    D,
    K,
    PROGRAMS,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    KEEP: tl.constexpr,
    SCALED: tl.constexpr,
):
    # Persistent programs: the next tile's first loads overlap the end of this one. Column tiles vary fastest:
    # the weight stays in the L2 cache, and each row of x is read about once.
    blocks = tl.cdiv(D, BLOCK_D)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * blocks, PROGRAMS, flatten=True):
        row, column = tile // blocks * BLOCK_M, tile % blocks * BLOCK_D
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for k in range(0, K, BLOCK_K):
            total = product(x_desc.load([row, k]), weight_desc.load([column, k]).T, total)
        x_scale, out_scale = 1.0, 1.0
        if SCALED:
            rows = row + tl.arange(0, BLOCK_M)
            x_scale = tl.load(x_scale_ptr + rows, mask=rows < M, other=1.0)[:, None]
            out_scale = tl.load(out_scale_ptr + rows, mask=rows < M, other=1.0)[:, None]
        ends = bias_ptr, weight_scale_ptr, x_scale, out_scale, slope_desc, active_desc, out_desc
        if SLICES == 1:
            _end_tile(total, row, column, ends, D, KEEP, SCALED, BLOCK_D)
        else:  # of half the columns each: fewer registers
            left, right = total.reshape(BLOCK_M, 2, BLOCK_D // 2).permute(0, 2, 1).split()
            _end_tile(left, row, column, ends, D, KEEP, SCALED, BLOCK_D // 2)
            _end_tile(right, row, column + BLOCK_D // 2, ends, D, KEEP, SCALED, BLOCK_D // 2)


@jit
def _end_tile(total, row, column, ends, D, KEEP: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr):
    bias_ptr, weight_scale_ptr, x_scale, out_scale, slope_desc, active_desc, out_desc = ends
    columns = column + tl.arange(0, WIDTH)
    if SCALED:
        total *= x_scale * tl.load(weight_scale_ptr + columns, mask=columns < D, other=0.0)[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    hidden = total + bias[None, :]
    out = gelu_of(hidden, EXACT=False)
    if KEEP:
        slope_desc.store([row, column], gelu_slope(hidden, EXACT=False).to(slope_desc.dtype))
    if SCALED:
        if KEEP:
            active_desc.store([row, column], out.to(active_desc.dtype))
        out *= 1.0 / out_scale
    out_desc.store([row, column], out.to(out_desc.dtype))


def _launch(D: int) -> tuple[int, ...]:
    return LAUNCH_FORWARD.get(triton.next_power_of_2(D), LAUNCH_FORWARD[4096])


def _fits(x: torch.Tensor, weight_DK: torch.Tensor, launch: tuple[int, ...], multiple: int) -> bool:
    """Whether the kernel takes these: halves, rows of whole 16 bytes, a tile at least, TMA."""
    D, K = weight_DK.shape
    block_m, block_d, block_k, *_ = launch
    halves = x.dtype == weight_DK.dtype and x.dtype in (torch.bfloat16, torch.float16)
    large = D >= block_d and K >= block_k and math.prod(x.shape[:-1]) >= block_m
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return halves and large and D % multiple == 0 and K % multiple == 0 and (hopper or INTERPRETED)


def _run(x_MK, weight_DK, bias_D, scales, keep, launch):
    """Out (M, D) in x's dtype and, in the bias', slope and active, or nothing.

    `scales` are of the rows of x, weight and out; without them out is active, which is not made twice.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    block_m, block_d, block_k, slices, num_warps, num_stages = launch
    x_MK, weight_DK = for_bulk_copies(x_MK), for_bulk_copies(weight_DK)
    (M, K), D = x_MK.shape, len(weight_DK)
    out_MD = x_MK.new_empty((M, D))
    slope_MD = bias_D.new_empty((M, D) if keep else 0)
    active_MD = bias_D.new_empty((M, D) if keep and scales else 0)

    def tiles(tensor, *block):
        return TensorDescriptor.from_tensor(tensor, list(block))

    with torch.cuda.device_of(x_MK):
        programs = multiprocessors(x_MK)
        slope, active, out = (
            tiles(made if made.numel() else out_MD, block_m, block_d // slices)
            for made in (slope_MD, active_MD, out_MD)
        )
        _linear_gelu_kernel[(min(programs, triton.cdiv(M, block_m) * triton.cdiv(D, block_d)),)](
            tiles(x_MK, block_m, block_k),
            tiles(weight_DK, block_d, block_k),
            bias_D.contiguous(),
            *(scales or (None, None, None)),
            *(slope, active, out),
            *(M, D, K, programs),
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            BLOCK_K=block_k,
            SLICES=slices,
            KEEP=keep,
            SCALED=scales is not None,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out_MD, slope_MD, active_MD


@torch.library.custom_op(
    "miles_fast::linear_gelu",
    mutates_args=(),
    schema="(Tensor x_MK, Tensor weight_DK, Tensor bias_D, bool keep) -> (Tensor, Tensor)",
)
def linear_gelu(x_MK, weight_DK, bias_D, keep):
    """(active, slope or with keep=False nothing): both of (M, D), no history.

    Only where `takes` says so. By quack on a Hopper GPU where it is installed, else by Triton.
    """
    bias_D = bias_D.to(x_MK.dtype)
    if products := quack_for(x_MK.device):
        inputs = (for_bulk_copies(tensor) for tensor in (x_MK, weight_DK, bias_D))
        return products.linear_gelu(*inputs, keep)
    return _run(x_MK, weight_DK, bias_D, None, keep, _launch(len(weight_DK)))[:2]


@linear_gelu.register_fake
def _(x_MK, weight_DK, bias_D, keep):
    shape = len(x_MK), len(weight_DK)
    return x_MK.new_empty(shape), x_MK.new_empty(shape if keep else 0)


@torch.library.custom_op(
    "miles_fast::scaled_linear_gelu",
    mutates_args=(),
    schema="(Tensor x_MK, Tensor weight_DK, Tensor bias_D, Tensor x_scale_M, Tensor weight_scale_D, "
    "Tensor out_scale_M, bool keep) -> (Tensor, Tensor, Tensor)",
)
def scaled_linear_gelu(x_MK, weight_DK, bias_D, x_scale_M, weight_scale_D, out_scale_M, keep):
    """E4m3 of active / out_scale and, with keep=False nothing, slope and active in the bias' dtype.

    All of (M, D), no history. hidden = x_scale weight_scale (x weight^T) + bias of e4m3 numbers. Only where
    `takes_scaled` says so. By quack on a Hopper GPU where it is installed, else by Triton.
    """
    scales = tuple(map(for_bulk_copies, (x_scale_M, weight_scale_D, out_scale_M)))
    if products := quack_for(x_MK.device):
        inputs = map(for_bulk_copies, (x_MK, weight_DK, bias_D))
        return products.scaled_linear_gelu(*inputs, *scales, keep)
    return _run(x_MK, weight_DK, bias_D, scales, keep, LAUNCH_SCALED)


@scaled_linear_gelu.register_fake
def _(x_MK, weight_DK, bias_D, x_scale_M, weight_scale_D, out_scale_M, keep):
    shape = len(x_MK), len(weight_DK)
    kept = (bias_D.new_empty(shape if keep else 0) for _ in range(2))
    return x_MK.new_empty(shape), *kept


def takes(x: torch.Tensor, weight_DK: torch.Tensor) -> bool:
    """Whether `linear_gelu` takes what Triton runs on, x of (..., K).

    Halves on Hopper GPUs and later (or under TRITON_INTERPRET=1), at least 256 numbers out, 64 in, 128 rows.
    """
    return _fits(x, weight_DK, _launch(len(weight_DK)), 8)


def takes_scaled(x: torch.Tensor, weight_DK: torch.Tensor) -> bool:
    """Whether `scaled_linear_gelu` takes 8-bit floats of what are halves here."""
    return runs_triton(x) and _fits(x, weight_DK, LAUNCH_SCALED, 16)


@register_flop_formula([torch.ops.miles_fast.linear_gelu, torch.ops.miles_fast.scaled_linear_gelu])
def _(x_shape, weight_shape, *_, **__):
    return 2 * math.prod(x_shape) * weight_shape[0]
