"""residual_norm: the LayerNorm of a residual's sum, which goes on itself, and every gradient from one pass.

    x_hat = (total - mean(total)) rstd,   out = x_hat weight + bias

over the last dimension, D. With d_out and, where the total itself goes on, d_later:

    d_total = d_later + rstd (w d_out - mean(w d_out) - x_hat mean(w d_out x_hat)),   w = weight
    d_weight = sum d_out x_hat,   d_bias = sum d_out

A compiler leaves the sums over rows to a pass of their own, which reads all of it once more: a third of what
the backward passes of a block's LayerNorms move. Two biases get their gradient here as well, since the
numbers they sum are at hand: `branch_bias`, which the total already holds without its history (sum d_total),
and `later_bias`, which is held so by what will be added to the total (sum d_later).

All in float32; sums over rows are of chunks, in their order: no atomics. Saved for backward: total, and mean
and rstd of its rows.

Letters: M rows, D columns, C chunks of rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from miles_fast.kernels.dispatch import jit, multiprocessors, runs_triton, tl, triton

# D rounded up to a power of two -> (rows per step, programs per multiprocessor, warps, pipeline stages). The
# fastest of those that `python benchmarks/micro.py --op residual_norm --sweep` tries, on an H100 at 128 clips
# of 785 tokens of 768, bf16.
LAUNCH_BACKWARD = {1024: (2, 2, 4, 4)}


def residual_norm_reference(
    total: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_bias_D: torch.Tensor | None = None,
    later_bias_D: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, total) (..., D): the definition, in any dtype, differentiable by autograd."""
    if branch_bias_D is not None:
        total = total + (branch_bias_D - branch_bias_D.detach())
    out = F.layer_norm(total, total.shape[-1:], weight_D, bias_D, eps)
    if later_bias_D is not None:
        total = total + (later_bias_D - later_bias_D.detach())
    return out, total


@jit
def _differentiate_norm_kernel(
    d_out_ptr,
    d_later_ptr,
    total_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    d_total_ptr,
    partial_ptr,
    M,
    D,
    steps,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    d_branch_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    d_later_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (column < D)[None, :]
        place = row[:, None] * D + column[None, :]
        d_out = tl.load(d_out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        x_hat = tl.where(inside, (total - mean[:, None]) * rstd[:, None], 0.0)
        scaled = d_out * weight[None, :]
        mean_scaled, mean_product = tl.sum(scaled, axis=1) / D, tl.sum(scaled * x_hat, axis=1) / D
        d_total = rstd[:, None] * (scaled - mean_scaled[:, None] - x_hat * mean_product[:, None])
        if d_later_ptr is not None:
            d_later = tl.load(d_later_ptr + place, mask=inside, other=0.0).to(tl.float32)
            d_total += d_later
            d_later_bias += d_later
        tl.store(d_total_ptr + place, d_total, mask=inside)
        d_weight += d_out * x_hat
        d_bias += d_out
        d_branch_bias += d_total
    parts = partial_ptr + chunk * 4 * D + column
    tl.store(parts, tl.sum(d_weight, axis=0), mask=column < D)
    tl.store(parts + D, tl.sum(d_bias, axis=0), mask=column < D)
    tl.store(parts + 2 * D, tl.sum(d_branch_bias, axis=0), mask=column < D)
    tl.store(parts + 3 * D, tl.sum(d_later_bias, axis=0), mask=column < D)


# An opaque custom op rather than triton_op: `wrap_triton` refuses interpreted kernels.
@torch.library.custom_op(
    "miles_fast::residual_norm_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor? d_later, Tensor total, Tensor weight_D, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor)",
)
def _residual_norm_backward(d_out, d_later, total, weight_D, mean, rstd):
    """d_total, and the sums for weight, bias, branch_bias and later_bias (4, D) in float32."""
    d_out, total = d_out.contiguous(), total.contiguous()
    D = total.shape[-1]
    M = math.prod(total.shape[:-1])
    block_d = triton.next_power_of_2(D)
    rows, programs, num_warps, stages = LAUNCH_BACKWARD.get(
        block_d, (1, 3, max(1, min(16, block_d // 256)), 3)
    )
    d_total = torch.empty_like(total)
    steps = max(1, triton.cdiv(M, rows * programs * multiprocessors(total)))
    C = triton.cdiv(M, rows * steps)
    partial_C4D = total.new_empty((C, 4, D), dtype=torch.float32)
    if total.numel():
        with torch.cuda.device_of(total):
            _differentiate_norm_kernel[(C,)](
                d_out,
                None if d_later is None else d_later.contiguous(),
                *(total, weight_D.contiguous(), mean.contiguous(), rstd.contiguous(), d_total, partial_C4D),
                *(M, D, steps),
                ROWS=rows,
                STAGES=stages,
                BLOCK_D=block_d,
                num_warps=num_warps,
            )
    return d_total, partial_C4D.sum(0)


@_residual_norm_backward.register_fake
def _(d_out, d_later, total, weight_D, mean, rstd):
    return total.new_empty(total.shape), total.new_empty((4, total.shape[-1]), dtype=torch.float32)


class _ResidualNorm(torch.autograd.Function):
    """Forward is plain torch, which a compiler fuses with what comes before and after."""

    @staticmethod
    def forward(ctx, total, weight_D, bias_D, branch_bias_D, later_bias_D, eps, with_total):
        out, mean, rstd = torch.native_layer_norm(total, total.shape[-1:], weight_D, bias_D, eps)
        ctx.save_for_backward(total, weight_D, mean.float(), rstd.float())
        ctx.biases = [bias is not None for bias in (branch_bias_D, later_bias_D)]
        return (out, total.view_as(total)) if with_total else out

    @staticmethod
    def backward(ctx, d_out, d_later=None):
        d_total, sums_4D = _residual_norm_backward(d_out, d_later, *ctx.saved_tensors)
        d_weight, d_bias, *d_biases = sums_4D.to(ctx.saved_tensors[1].dtype).unbind()
        d_biases = (d if given else None for d, given in zip(d_biases, ctx.biases, strict=True))
        return d_total, d_weight, d_bias, *d_biases, None, None


def residual_norm(
    total: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_bias_D: torch.Tensor | None = None,
    later_bias_D: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    with_total: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(LayerNorm of total, total), (..., D) in its dtype; `with_total=False`: (LayerNorm, None).

    `branch_bias_D` and `later_bias_D` get their gradients here: the total, and what will be added to it,
    already hold them without their history.

    The backward pass is a Triton kernel for float32, bfloat16 and float16 on CUDA tensors (or under
    TRITON_INTERPRET=1), else the reference's.

    Raises:
        ValueError: total is not floating-point (..., D), or weight and biases not (D,) of one dtype.
    """
    vectors = weight_D, bias_D, branch_bias_D, later_bias_D
    given = [vector for vector in vectors if vector is not None]
    if not total.is_floating_point():
        raise ValueError(f"total must be floating-point, got {total.dtype} {tuple(total.shape)}")
    if any(vector.shape != total.shape[-1:] or vector.dtype != weight_D.dtype for vector in given):
        found = ", ".join(f"{vector.dtype} {tuple(vector.shape)}" for vector in given)
        raise ValueError(f"weight and biases must be ({total.shape[-1]},) of one dtype, got {found}")
    if runs_triton(total, weight_D, bias_D):
        found = _ResidualNorm.apply(total, *vectors, eps, with_total)
        return found if with_total else (found, None)
    out, total = residual_norm_reference(total, *vectors, eps=eps)
    return out, total if with_total else None


def takes_biases(x: torch.Tensor) -> bool:
    """Whether `residual_norm` gives biases their gradients at no cost: on a GPU."""
    return x.is_cuda and runs_triton(x)
