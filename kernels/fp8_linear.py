"""fp8_linear: a linear layer whose product is of 8-bit floats and whose gradients are its own, unrounded.

    out[m, n] = s_x[m] s_w[n] sum_k x8[m, k] w8[n, k] + bias[n]
    s_x[m] = max_k |x[m, k]| / 448,   x8[m, k] = e4m3(x[m, k] / s_x[m]),   and so for the rows of w

x is (..., K), 448 the largest number of e4m3. Scales are made anew by every call, so that there is no state,
and for every row, so that an outlier coarsens its own token only. The gradients are those of
F.linear(x, w, bias) (straight through): products in fp8 would need casts of the incoming gradient and
transposed ones of x, which cost about what they save.

No Triton: torch has the product (and `product` the input's gradient), and plain casts are what torch.compile
joins with whatever wrote x. The caller keeps K and N multiples of 16, which the product's hardware asks for.
Saved for backward: x and w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from miles_fast.kernels.linear import product

LARGEST = torch.finfo(torch.float8_e4m3fn).max
TINY = 1e-30  # of a row's largest number: rows of zeros are divided by something


def quantized_rows(rows_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers (M, K) and the float32 scale of each row (M, 1); inf and nan make the scale such."""
    scale_M1 = rows_MK.abs().amax(-1, keepdim=True).float().clamp(min=TINY) / LARGEST
    return (rows_MK.float() / scale_M1).to(torch.float8_e4m3fn).contiguous(), scale_M1


def rounded_product(
    x8: torch.Tensor,
    scale_x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """e4m3 (..., K) and the scale of each row (..., 1) by a weight not yet rounded: (..., N) of `dtype`.

    A float32 product of the numbers that the 8 bits stand for: the definition.
    """
    w8, scale_w = quantized_rows(weight_NK)
    out = F.linear(x8.float() * scale_x, w8.float() * scale_w)
    return (out if bias_N is None else out + bias_N).to(dtype)


def scaled_product(
    x8: torch.Tensor,
    scale_x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`rounded_product` of a matrix (M, K); on a GPU torch._scaled_mm."""
    if not x8.is_cuda:
        return rounded_product(x8, scale_x, weight_NK, bias_N, dtype)
    w8, scale_w = quantized_rows(weight_NK)
    scales = scale_x, scale_w.t()
    return torch._scaled_mm(x8, w8.t(), *scales, bias=bias_N, out_dtype=dtype, use_fast_accum=True)


def fp8_linear_reference(
    x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer's output (..., N), by a float32 product of the numbers that the 8 bits stand for."""
    return rounded_product(*quantized_rows(x), weight_NK, bias_N, x.dtype)


def check_halves(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise ValueError where on a GPU these are not bfloat16."""
    if x.is_cuda and not (x.dtype == weight.dtype == torch.bfloat16):
        raise ValueError(f"fp8 products take bfloat16 on a GPU, got {x.dtype} and {weight.dtype}")


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_NK, bias_N):
        ctx.save_for_backward(x, weight_NK)
        out = scaled_product(*quantized_rows(x.flatten(0, -2)), weight_NK, bias_N, x.dtype)
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, d_out):
        x, weight_NK = ctx.saved_tensors
        d_out_MN = d_out.flatten(0, -2)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = product(d_out_MN, weight_NK, None, False, None).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = d_out_MN.t() @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            d_bias = d_out_MN.sum(0)
        return d_x, d_weight, d_bias


def fp8_linear(x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias, (..., K) to (..., N): torch._scaled_mm on a GPU, the reference elsewhere.

    Raises ValueError where on a GPU x and weight are not bfloat16.
    """
    check_halves(x, weight_NK)
    return _Fp8Linear.apply(x, weight_NK, bias_N)
