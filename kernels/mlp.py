"""mlp: two linear layers around an exact GELU.

    hidden = x first^T + first_bias,   active = gelu(hidden)
    out = active second^T + second_bias (+ residual)
    d_hidden = (d_out second) slope,   slope = gelu'(hidden),   d_first_bias[d] = sum_m d_hidden[m, d]

GELU and its slope are computed where the first product still lies in registers (kernels/linear_gelu.py), and
where quack is installed d_hidden and the first bias' gradient where the product of the output's gradient lies
(kernels/quack_products.py): the slope is read once, and nothing else of (M, D) beside what the products take.

Saved for backward: x, the weights, slope and active. Letters: M rows, K numbers in and out, D hidden ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from miles_fast.kernels.biased_gelu import biased_gelu, gelu_backward
from miles_fast.kernels.dispatch import for_bulk_copies, quack_for, runs_triton
from miles_fast.kernels.linear import check_residual, product
from miles_fast.kernels.linear_gelu import linear_gelu, takes


def mlp_reference(
    x: torch.Tensor,
    first_DK: torch.Tensor,
    first_bias_D: torch.Tensor,
    second_KD: torch.Tensor,
    second_bias_K: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layers' output (..., K): the definition, in any dtype."""
    out = F.linear(F.gelu(F.linear(x, first_DK, first_bias_D)), second_KD, second_bias_K)
    return out if residual is None else residual + out


@torch.library.custom_op(
    "miles_fast::product_slope",
    mutates_args=(),
    schema="(Tensor d_out_MK, Tensor second_KD, Tensor slope_MD) -> (Tensor, Tensor)",
)
def _product_slope(d_out_MK, second_KD, slope_MD):
    """Gradients of hidden (M, D) and of the first bias (D), float32."""
    if not runs_triton(slope_MD):
        d_hidden_MD = (d_out_MK @ second_KD) * slope_MD
        return d_hidden_MD, d_hidden_MD.sum(0, dtype=torch.float32)
    if takes(d_out_MK, second_KD.t()) and (products := quack_for(slope_MD.device)):
        return products.product_slope(*map(for_bulk_copies, (d_out_MK, second_KD, slope_MD)))
    return gelu_backward(d_out_MK @ second_KD, slope_MD, True)


@_product_slope.register_fake
def _(d_out_MK, second_KD, slope_MD):
    return slope_MD.new_empty(slope_MD.shape), slope_MD.new_empty(slope_MD.shape[1:], dtype=torch.float32)


@register_flop_formula(torch.ops.miles_fast.product_slope)
def _(d_out_shape, second_shape, *_, **__):
    return 2 * d_out_shape[0] * second_shape[0] * second_shape[1]


class Mlp(torch.autograd.Function):
    """The layers; of kernels/fp8_mlp.py's the gradients too."""

    @staticmethod
    def forward(ctx, x, first_DK, first_bias_D, second_KD, second_bias_K, residual, keep):
        x_MK = x.flatten(0, -2)
        active_MD, slope_MD = linear_gelu(x_MK, first_DK, first_bias_D, keep)
        ctx.save_for_backward(x_MK, first_DK, second_KD, slope_MD, active_MD)
        ctx.bias_dtypes = first_bias_D.dtype, second_bias_K.dtype
        residual_MK = None if residual is None else residual.flatten(0, -2)
        return product(active_MD, second_KD, second_bias_K, True, residual_MK).view(x.shape)

    @staticmethod
    def backward(ctx, d_out):
        x_MK, first_DK, second_KD, slope_MD, active_MD = ctx.saved_tensors
        d_out_MK, needed = d_out.flatten(0, -2), ctx.needs_input_grad
        of_first, of_second = ctx.bias_dtypes
        d_x = d_first_DK = d_first_bias_D = None
        if any(needed[:3]):
            d_hidden_MD, d_first_bias_D = _product_slope(d_out_MK, second_KD, slope_MD)
            d_first_bias_D = d_first_bias_D.to(of_first)
            d_x = product(d_hidden_MD, first_DK, None, False, None).view(d_out.shape) if needed[0] else None
            d_first_DK = d_hidden_MD.t() @ x_MK if needed[1] else None
        d_second_KD = d_out_MK.t() @ active_MD if needed[3] else None
        d_second_bias_K = d_out_MK.sum(0).to(of_second) if needed[4] else None
        d_residual = d_out if needed[5] else None
        return d_x, d_first_DK, d_first_bias_D, d_second_KD, d_second_bias_K, d_residual, None


def mlp(
    x: torch.Tensor,
    first_DK: torch.Tensor,
    first_bias_D: torch.Tensor,
    second_KD: torch.Tensor,
    second_bias_K: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """second gelu(first x + first_bias) + second_bias, (..., K) to (..., K), or residual (..., K) + that.

    One kernel a product and its GELU for bfloat16 and float16 on Hopper GPUs and later (or under
    TRITON_INTERPRET=1) from 256 hidden numbers, 64 in and 128 rows on: by quack where it is installed, else
    by Triton. On other GPUs, and in float32, the products and `biased_gelu`; else the reference.

    Raises ValueError for a residual of another dtype than x.
    """
    check_residual(x, second_bias_K, residual)
    inputs = x, first_DK, first_bias_D, second_KD, second_bias_K, residual
    if runs_triton(x) and takes(x, first_DK):
        return Mlp.apply(*inputs, torch.is_grad_enabled())
    if x.is_cuda and runs_triton(x):
        active = biased_gelu(F.linear(x, first_DK, first_bias_D.detach()), first_bias_D)
        out = F.linear(active, second_KD, second_bias_K)
        return out if residual is None else residual + out
    return mlp_reference(*inputs)
