"""mlp: two linear layers around an exact GELU.

    hidden = x first^T + first_bias,   active = gelu(hidden)
    out = active second^T + second_bias (+ residual)
    d_hidden = (d_out second) gelu'(hidden),   d_first_bias[d] = sum_m d_hidden[m, d]

GELU is computed where the first product still lies in registers (kernels/linear_gelu.py), and where quack is
installed its gradient and the first bias' where the product of the output's gradient lies
(kernels/quack_products.py): hidden is read once, and nothing else of (M, D) beside what the products take.

Saved for backward: x, the weights, hidden and active. Letters: M rows, K numbers in and out, D hidden ones.
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
    "miles_fast::product_gelu_backward",
    mutates_args=(),
    schema="(Tensor d_out_MK, Tensor second_KD, Tensor hidden_MD, bool again) -> (Tensor, Tensor, Tensor)",
)
def _product_gelu_backward(d_out_MK, second_KD, hidden_MD, again):
    """Gradients of hidden (M, D) and of the first bias (D), float32; `again` gelu(hidden), else nothing."""
    if not runs_triton(hidden_MD):
        d_hidden_MD = torch.ops.aten.gelu_backward(d_out_MK @ second_KD, hidden_MD)
        active_MD = F.gelu(hidden_MD) if again else hidden_MD.new_empty(0)
        return d_hidden_MD, d_hidden_MD.sum(0, dtype=torch.float32), active_MD
    if takes(d_out_MK, second_KD.t()) and (products := quack_for(hidden_MD)):
        return products.gelu_gradient(*map(for_bulk_copies, (d_out_MK, second_KD, hidden_MD)), again)
    return gelu_backward(d_out_MK @ second_KD, hidden_MD, again)


@_product_gelu_backward.register_fake
def _(d_out_MK, second_KD, hidden_MD, again):
    shape = hidden_MD.shape
    d_bias_D = hidden_MD.new_empty(shape[1:], dtype=torch.float32)
    return hidden_MD.new_empty(shape), d_bias_D, hidden_MD.new_empty(shape if again else 0)


@register_flop_formula(torch.ops.miles_fast.product_gelu_backward)
def _(d_out_shape, second_shape, *_, **__):
    return 2 * d_out_shape[0] * second_shape[0] * second_shape[1]


class Mlp(torch.autograd.Function):
    """The layers; of kernels/fp8_mlp.py's, which keep no `active`, the gradients too."""

    @staticmethod
    def forward(ctx, x, first_DK, first_bias_D, second_KD, second_bias_K, residual, keep):
        x_MK = x.flatten(0, -2)
        active_MD, hidden_MD = linear_gelu(x_MK, first_DK, first_bias_D, keep)
        ctx.save_for_backward(x_MK, first_DK, second_KD, hidden_MD, active_MD)
        ctx.bias_dtypes = first_bias_D.dtype, second_bias_K.dtype
        residual_MK = None if residual is None else residual.flatten(0, -2)
        return product(active_MD, second_KD, second_bias_K, True, residual_MK).view(x.shape)

    @staticmethod
    def backward(ctx, d_out):
        x_MK, first_DK, second_KD, hidden_MD, *kept = ctx.saved_tensors
        d_out_MK, needed = d_out.flatten(0, -2), ctx.needs_input_grad
        of_first, of_second = ctx.bias_dtypes
        d_x = d_first_DK = d_first_bias_D = None
        again = needed[3] and len(kept) == 0
        if any(needed[:3]) or again:
            d_hidden_MD, d_first_bias_D, *made = _product_gelu_backward(d_out_MK, second_KD, hidden_MD, again)
            d_first_bias_D = d_first_bias_D.to(of_first)
            d_x = product(d_hidden_MD, first_DK, None, False, None).view(d_out.shape) if needed[0] else None
            d_first_DK = d_hidden_MD.t() @ x_MK if needed[1] else None
        d_second_KD = d_out_MK.t() @ (made if again else kept)[0] if needed[3] else None
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
