"""linear: a linear layer, or a residual and one, whose product and input's gradient quack computes on Hopper.

    out[m, d] = sum_k x[m, k] weight[d, k] + bias[d] (+ residual[m, d])
    d_x[m, k] = sum_d d_out[m, d] weight[d, k],   d_residual = d_out

There a tile's end, residual included, runs beside the next tile's product. cuBLAS takes 1 to 17 % longer at
the shapes of ViT-B (an H100, 128 clips of 785 tokens, no residuals: 0.51 to 0.54 for 0.46 ms of qkv, 0.20 for
0.18 of proj, 0.71 to 0.73 for 0.70 of the MLP's second), but less for the gradients of the weights, which
stay.

Letters: M rows, K numbers in, D numbers out; in `product`, K are summed over and N come out.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from miles_fast.kernels.dispatch import for_bulk_copies, has_quack, quack_for

_LEAST_ROWS = 8192  # of fewer, such tiles leave multiprocessors without work


def _takes_quack(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether quack is for products of x (..., K)."""
    halves = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return halves and _fills(x)


def _fills(x: torch.Tensor) -> bool:
    return has_quack(x.device) and math.prod(x.shape[:-1]) >= _LEAST_ROWS  # rows last: an export's vary


def products_for(x_MK: torch.Tensor, N: int) -> ModuleType | None:
    """kernels/quack_products.py where it is for a product of x to (M, N), of halves or 8-bit floats."""
    products = quack_for(x_MK.device) if _fills(x_MK) else None
    whole = x_MK.shape[1] * x_MK.element_size() % 16 == 0
    return products if products and whole and N % products.PRODUCT_COLUMNS == 0 else None


@torch.library.custom_op(
    "miles_fast::product",
    mutates_args=(),
    schema="(Tensor x_MK, Tensor weight, Tensor? bias_N, bool transposed, Tensor? residual_MN) -> Tensor",
)
def product(x_MK, weight, bias_N, transposed, residual_MN):
    """x weight^T + bias (M, N) of `transposed` weight (N, K), or x weight + bias of (K, N): no history.

    Added to a residual of the same dtype, if there is one; with a bias.
    """
    N = weight.shape[0 if transposed else 1]
    if _takes_quack(x_MK, weight) and (products := products_for(x_MK, N)):
        x_MK, weight = for_bulk_copies(x_MK), for_bulk_copies(weight)
        bias_N = None if bias_N is None else for_bulk_copies(bias_N.to(x_MK.dtype))
        residual_MN = None if residual_MN is None else for_bulk_copies(residual_MN)
        return products.product(x_MK, weight.T if transposed else weight, bias_N, residual_MN)
    out = F.linear(x_MK, weight if transposed else weight.T, bias_N)
    return out if residual_MN is None else out + residual_MN


@product.register_fake
def _(x_MK, weight, bias_N, transposed, residual_MN):
    return x_MK.new_empty(len(x_MK), weight.shape[0 if transposed else 1])


@register_flop_formula(torch.ops.miles_fast.product)
def _(x_shape, weight_shape, *_, **__):
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


def check_residual(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> None:
    """Raise ValueError where a residual comes without a bias, or in another dtype than x."""
    if residual is not None and (bias is None or residual.dtype != x.dtype):
        bias_is = "no bias" if bias is None else "a bias"
        raise ValueError(
            f"a residual needs a bias and the dtype of x, {x.dtype}, got {bias_is} and {residual.dtype}"
        )


class Linear(torch.autograd.Function):
    """The layer; of kernels/fp8_linear.py's the gradients too."""

    @staticmethod
    def forward(ctx, x, weight_DK, bias_D, residual):
        ctx.save_for_backward(x, weight_DK)
        ctx.bias_dtype = None if bias_D is None else bias_D.dtype
        residual_MD = None if residual is None else residual.flatten(0, -2)
        return product(x.flatten(0, -2), weight_DK, bias_D, True, residual_MD).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, d_out):
        x, weight_DK = ctx.saved_tensors
        d_out_MD = d_out.flatten(0, -2)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = product(d_out_MD, weight_DK, None, False, None).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = d_out_MD.t() @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            d_bias = d_out_MD.sum(0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, d_out if ctx.needs_input_grad[3] else None


def linear(
    x: torch.Tensor,
    weight_DK: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x weight^T + bias, (..., K) to (..., D), as torch.nn.functional.linear; residual + that, if given.

    By quack for bfloat16 and float16 on a Hopper GPU from 8,192 rows on, if a multiple of 192 numbers comes
    out of the product; else by cuBLAS.
    """
    check_residual(x, bias_D, residual)
    if _takes_quack(x, weight_DK):
        return Linear.apply(x, weight_DK, bias_D, residual)
    out = F.linear(x, weight_DK, bias_D)
    return out if residual is None else residual + out
