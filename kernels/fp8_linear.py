"""fp8_linear: a linear layer whose product is of 8-bit floats and whose gradients are its own, unrounded.

    out[m, n] = s_x[m] s_w[n] sum_k x8[m, k] w8[n, k] + bias[n] (+ residual[m, n])
    s_x[m] = max_k |x[m, k]| / 448,   x8[m, k] = e4m3(x[m, k] / s_x[m]),   and so for the rows of w

x is (..., K), 448 the largest number of e4m3. Scales are made anew by every call, so that there is no state,
and for every row, so that an outlier coarsens its own token only. The gradients are those of
F.linear(x, w, bias) (straight through): products in fp8 would need casts of the incoming gradient and
transposed ones of x, which cost about what they save.

The product is quack's where a bias is added and kernels/linear.py's would be, else torch's, and plain casts
are what torch.compile joins with whatever wrote x. The caller keeps K and N multiples of 16, which the
product's hardware asks for. Saved for backward: x and w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from miles_fast.kernels.dispatch import for_bulk_copies
from miles_fast.kernels.linear import Linear, check_residual, products_for

LARGEST = torch.finfo(torch.float8_e4m3fn).max
TINY = 1e-30  # of a row's largest number: rows of zeros are divided by something


def quantized_rows(rows_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers (M, K) and the float32 scale of each row (M, 1); inf and nan make the scale such."""
    scale_M1 = rows_MK.abs().amax(-1, keepdim=True).float().clamp(min=TINY) / LARGEST
    return (rows_MK.float() / scale_M1).to(torch.float8_e4m3fn).contiguous(), scale_M1


def rounded_product(
    x8: torch.Tensor,
    scale_x: torch.Tensor,
    w8_NK: torch.Tensor,
    scale_w_N1: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """e4m3 (..., K) and the scale of each row (..., 1) by the weight's: (..., N) of `dtype`.

    A float32 product of the numbers that the 8 bits stand for: the definition.
    """
    out = F.linear(x8.float() * scale_x, w8_NK.float() * scale_w_N1)
    return (out if bias_N is None else out + bias_N).to(dtype)


@torch.library.custom_op(
    "miles_fast::scaled_product",
    mutates_args=(),
    schema="(Tensor x8_MK, Tensor scale_x_M1, Tensor w8_NK, Tensor scale_w_N1, Tensor? bias_N, "
    "Tensor? residual_MN, ScalarType dtype) -> Tensor",
)
def scaled_product(x8_MK, scale_x_M1, w8_NK, scale_w_N1, bias_N, residual_MN, dtype):
    """`rounded_product` of a matrix, added to a residual of `dtype`, if there is one: no history.

    On a GPU by quack, with a bias, or torch._scaled_mm.
    """
    if bias_N is not None and (products := products_for(x8_MK, len(w8_NK))):
        inputs = x8_MK, scale_x_M1[:, 0], w8_NK, scale_w_N1[:, 0], bias_N.to(dtype), residual_MN
        return products.scaled_product(*(None if one is None else for_bulk_copies(one) for one in inputs))
    if x8_MK.is_cuda:
        scales = scale_x_M1, scale_w_N1.t()
        out = torch._scaled_mm(x8_MK, w8_NK.t(), *scales, bias=bias_N, out_dtype=dtype, use_fast_accum=True)
    else:
        out = rounded_product(x8_MK, scale_x_M1, w8_NK, scale_w_N1, bias_N, dtype)
    return out if residual_MN is None else out + residual_MN


@scaled_product.register_fake
def _(x8_MK, scale_x_M1, w8_NK, scale_w_N1, bias_N, residual_MN, dtype):
    return x8_MK.new_empty(x8_MK.shape[0], w8_NK.shape[0], dtype=dtype)


@register_flop_formula(torch.ops.miles_fast.scaled_product)
def _(x_shape, _scale, weight_shape, *_, **__):
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


def fp8_linear_reference(
    x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer's output (..., N), by a float32 product of the numbers that the 8 bits stand for."""
    return rounded_product(*quantized_rows(x), *quantized_rows(weight_NK), bias_N, x.dtype)


def check_halves(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise ValueError where on a GPU these are not bfloat16."""
    if x.is_cuda and not (x.dtype == weight.dtype == torch.bfloat16):
        raise ValueError(f"fp8 products take bfloat16 on a GPU, got {x.dtype} and {weight.dtype}")


class _Fp8Linear(Linear):
    @staticmethod
    def forward(ctx, x, weight_NK, bias_N, residual):
        ctx.save_for_backward(x, weight_NK)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        eights = *quantized_rows(x.flatten(0, -2)), *quantized_rows(weight_NK)
        residual_MN = None if residual is None else residual.flatten(0, -2)
        return scaled_product(*eights, bias_N, residual_MN, x.dtype).unflatten(0, x.shape[:-1])


def fp8_linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x weight^T + bias, (..., K) to (..., N); residual + that, if given.

    On a GPU by torch._scaled_mm or, on Hopper with a bias from 8,192 rows on, if a multiple of 192 numbers
    comes out, by quack; elsewhere the reference.

    Raises ValueError where on a GPU x and weight are not bfloat16, and for a residual without a bias or of
    another dtype than x.
    """
    check_halves(x, weight_NK)
    check_residual(x, bias_N, residual)
    return _Fp8Linear.apply(x, weight_NK, bias_N, residual)
