"""biased_gelu: GELU of a linear layer's output, and that layer's bias gradient from the same pass.

    out[m, d] = gelu(hidden[m, d]),   gelu(x) = x Phi(x), exact (erf)
    d_hidden[m, d] = d_out[m, d] (Phi(x) + x phi(x)),   d_bias[d] = sum_m d_hidden[m, d]

hidden (..., D) already holds `bias` (D): the product that made it added the bias' numbers without their
history, as in kernels/mlp.py. Autograd would sum d_hidden in a pass of its own, which reads it once
more: a quarter of what the backward pass moves. The sum is float32, over chunks of rows in their order: no
atomics.

Saved for backward: hidden. Letters: M rows, D columns, C chunks of rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from miles_fast.kernels.dispatch import jit, runs_triton, tl, triton

# D rounded up to a power of two -> (rows per step, steps, columns, warps) of a program.
# The fastest of those that `python benchmarks/micro.py --op biased_gelu --sweep` tries, on an H100 at 128
# clips of 785 tokens, bf16: 0.70 ms, where (32, 8, 128, 4) takes 0.91.
# Widths that are not named get the same.
LAUNCH_BACKWARD = {4096: (16, 16, 64, 2)}
_BLOCK_FORWARD = 4096  # numbers of a forward program


def biased_gelu_reference(hidden: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    """gelu(hidden) (..., D), with the bias' gradient: the definition, in any dtype."""
    return F.gelu(hidden + (bias_D - bias_D.detach()))


@jit
def _upper_tail(a):
    """1 - Phi(a) of a >= 0, to 5e-6 of itself: 2^q(a), q fitted on [0, 6]; beyond, it still falls to 0."""
    q = -1.83481018e-6 * a + 6.15982688e-5
    q = q * a - 9.30524655e-4
    q = q * a + 8.50789019e-3
    q = q * a - 5.39600677e-2
    q = q * a - 0.458464395
    q = q * a - 1.15125104
    q = q * a - 0.999995295
    return tl.exp2(q)


@jit
def gelu_of(x, EXACT: tl.constexpr):
    """gelu of float32 numbers: by erf, or to what a half can hold."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.maximum(x, 0.0) - tl.abs(x) * _upper_tail(tl.abs(x))


@jit
def gelu_slope(x, EXACT: tl.constexpr):
    """gelu'(x) of float32 numbers: by erf, or to what a half can hold."""
    density = tl.exp(-0.5 * x * x) * 0.3989422804014327
    if EXACT:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    tail = _upper_tail(tl.abs(x))
    return tl.where(x > 0, 1.0 - tail, tail) + x * density


@jit
def _gelu_kernel(hidden_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(hidden_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, gelu_of(x, hidden_ptr.dtype.element_ty == tl.float32), mask=inside)


@jit
def _gelu_gradient_kernel(
    d_out_ptr,
    hidden_ptr,
    d_hidden_ptr,
    partial_ptr,
    M,
    D,
    SLOPED: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # SLOPED: hidden_ptr holds gelu'(hidden) already.
    # Column blocks vary fastest: programs that run together read neighbouring memory.
    blocks = tl.cdiv(D, COLUMNS)
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for step in range(STEPS):
        row = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (column < D)[None, :]
        place = row.to(tl.int64)[:, None] * D + column[None, :]
        x = tl.load(hidden_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_hidden = d_out * (x if SLOPED else gelu_slope(x, hidden_ptr.dtype.element_ty == tl.float32))
        tl.store(d_hidden_ptr + place, d_hidden, mask=inside)
        total += tl.sum(d_hidden, axis=0)
    tl.store(partial_ptr + chunk * D + column, total, mask=column < D)


# Opaque custom ops rather than triton_op: `wrap_triton` refuses interpreted kernels, and on either side is a
# matrix product, with which the compiler fuses nothing.
@torch.library.custom_op(
    "miles_fast::biased_gelu", mutates_args=(), schema="(Tensor hidden, Tensor bias_D) -> Tensor"
)
def _biased_gelu(hidden, bias_D):
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    if out.numel():
        with torch.cuda.device_of(hidden):
            grid = (triton.cdiv(out.numel(), _BLOCK_FORWARD),)
            _gelu_kernel[grid](hidden, out, out.numel(), BLOCK=_BLOCK_FORWARD, num_warps=8)
    return out


@_biased_gelu.register_fake
def _(hidden, bias_D):
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op(
    "miles_fast::gelu_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor hidden, bool sloped) -> (Tensor, Tensor)",
)
def gelu_backward(d_out, hidden, sloped):
    """Gradients of hidden and of the bias, in float32; `sloped`: `hidden` is gelu'(hidden)."""
    d_out, hidden = d_out.contiguous(), hidden.contiguous()
    D = hidden.shape[-1]
    M = math.prod(hidden.shape[:-1])
    rows, steps, columns, num_warps = LAUNCH_BACKWARD.get(triton.next_power_of_2(D), LAUNCH_BACKWARD[4096])
    d_hidden = torch.empty_like(hidden)
    C = triton.cdiv(M, rows * steps)
    partial_CD = hidden.new_empty((C, D), dtype=torch.float32)
    if hidden.numel():
        with torch.cuda.device_of(hidden):
            _gelu_gradient_kernel[(C * triton.cdiv(D, columns),)](
                *(d_out, hidden, d_hidden, partial_CD, M, D),
                SLOPED=sloped,
                ROWS=rows,
                STEPS=steps,
                COLUMNS=columns,
                num_warps=num_warps,
            )
    return d_hidden, partial_CD.sum(0)


@gelu_backward.register_fake
def _(d_out, hidden, sloped):
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[-1:], dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    hidden, bias_D = inputs
    ctx.save_for_backward(hidden)
    ctx.bias_dtype = bias_D.dtype


def _backward(ctx, d_out):
    (hidden,) = ctx.saved_tensors
    d_hidden, d_bias_D = gelu_backward(d_out, hidden, False)
    return d_hidden, d_bias_D.to(ctx.bias_dtype)


_biased_gelu.register_autograd(_backward, setup_context=_save_for_backward)


def biased_gelu(hidden: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    """Exact GELU of (..., D), whose gradient reaches `hidden` and, summed over all rows, `bias_D`.

    Triton for float32, bfloat16 and float16 on CUDA tensors (or under TRITON_INTERPRET=1), else the
    reference. Tensors that are not contiguous are copied once.

    Raises:
        ValueError: hidden is not floating-point, or the bias is not (D,).
    """
    if not hidden.is_floating_point() or bias_D.shape != hidden.shape[-1:]:
        raise ValueError(
            f"hidden must be a floating-point (..., D) and the bias (D,), got {hidden.dtype} "
            f"{tuple(hidden.shape)} and {tuple(bias_D.shape)}"
        )
    if runs_triton(hidden):
        return _biased_gelu(hidden, bias_D)
    return biased_gelu_reference(hidden, bias_D)
