"""fp8_mlp: two linear layers around an exact GELU, whose products are of 8-bit floats.

    hidden = fp8_linear(x, first) + first_bias
    out = fp8_linear(gelu(hidden), second) + second_bias (+ residual)

but for the scales of gelu(hidden), which its product's kernel must know before it has seen a row of it:

    s[m] = (1.14 |x[m]| max_d |first[d]| + max_d |first_bias[d]|) / 448

No number of the row is larger than 448 s[m] (Cauchy and Schwarz; 1.14 for what rounding adds to x and first).
In a trained ViT-S on real clips the bound is 10 to 40 times a row's largest number. That costs an 8-bit float
little, which keeps its four significant bits down to 2^-15 of the bound: there rounding moves gelu(hidden) by
2.7 % instead of 2.6 %.

The gradients are those of the layers unrounded (straight through), of hidden as it was computed. Saved for
backward: x, the weights, gelu'(hidden) and gelu(hidden), which the second weight's gradient needs unrounded.

Letters: M rows, K numbers in and out, D hidden ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from miles_fast.kernels.fp8_linear import (
    LARGEST,
    TINY,
    check_halves,
    fp8_linear_reference,
    quantized_rows,
    rounded_product,
    scaled_product,
)
from miles_fast.kernels.linear import check_residual
from miles_fast.kernels.linear_gelu import scaled_linear_gelu, takes_scaled
from miles_fast.kernels.mlp import Mlp

_ROUNDED = 1.14  # (1 + 2^-4)^2, by which e4m3 can lengthen two numbers' product, and float32's own errors


def hidden_scales(x: torch.Tensor, first_DK: torch.Tensor, first_bias_D: torch.Tensor) -> torch.Tensor:
    """What gelu(hidden) is divided by before it is rounded to e4m3: (..., 1), float32."""
    longest = first_DK.float().norm(dim=-1).amax()
    bound = x.float().norm(dim=-1, keepdim=True) * (_ROUNDED * longest) + first_bias_D.abs().amax().float()
    return bound.clamp(min=TINY) / LARGEST


def fp8_mlp_reference(
    x: torch.Tensor,
    first_DK: torch.Tensor,
    first_bias_D: torch.Tensor,
    second_KD: torch.Tensor,
    second_bias_K: torch.Tensor,
) -> torch.Tensor:
    """The layers' output (..., K), by float32 products of the numbers that the 8 bits stand for."""
    active = F.gelu(fp8_linear_reference(x, first_DK, first_bias_D))
    scale = hidden_scales(x, first_DK, first_bias_D)
    active8 = (active.float() / scale).to(torch.float8_e4m3fn)
    return rounded_product(active8, scale, *quantized_rows(second_KD), second_bias_K, x.dtype)


class _Fp8Mlp(Mlp):
    @staticmethod
    def forward(ctx, x, first_DK, first_bias_D, second_KD, second_bias_K, residual, keep):
        x_MK = x.flatten(0, -2)
        (x8, scale_x), (first8, scale_first) = quantized_rows(x_MK), quantized_rows(first_DK)
        scale = hidden_scales(x_MK, first_DK, first_bias_D)
        if takes_scaled(x_MK, first_DK):
            active8, slope_MD, active_MD = scaled_linear_gelu(
                *(x8, first8, first_bias_D, scale_x[:, 0], scale_first[:, 0], scale[:, 0]), keep
            )
        else:
            hidden_MD = scaled_product(x8, scale_x, first8, scale_first, first_bias_D, None, x.dtype)
            active_MD = F.gelu(hidden_MD)
            slope_MD = None
            if keep:
                slope_MD = torch.ops.aten.gelu_backward(torch.ones_like(hidden_MD), hidden_MD)
            active8 = (active_MD.float() / scale).to(torch.float8_e4m3fn)
        ctx.save_for_backward(x_MK, first_DK, second_KD, slope_MD, active_MD)
        ctx.bias_dtypes = first_bias_D.dtype, second_bias_K.dtype
        residual_MK = None if residual is None else residual.flatten(0, -2)
        eights = active8, scale, *quantized_rows(second_KD)
        return scaled_product(*eights, second_bias_K, residual_MK, x.dtype).view(x.shape)


def fp8_mlp(
    x: torch.Tensor,
    first_DK: torch.Tensor,
    first_bias_D: torch.Tensor,
    second_KD: torch.Tensor,
    second_bias_K: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """second gelu(first x + first_bias) + second_bias, (..., K) to (..., K), or residual (..., K) + that.

    K and D are multiples of 16.

    bfloat16 on Hopper GPUs and later (or under TRITON_INTERPRET=1): the first product, GELU and the rounding
    of its output are one kernel from 256 hidden numbers, 128 in and 128 rows on, by quack where it is
    installed, else by Triton. Else plain torch. The second product is `fp8_linear`'s.

    Raises ValueError where on a GPU x and the weights are not bfloat16, and for a residual of another dtype.
    """
    check_halves(x, first_DK)
    check_residual(x, second_bias_K, residual)
    inputs = x, first_DK, first_bias_D, second_KD, second_bias_K, residual
    return _Fp8Mlp.apply(*inputs, torch.is_grad_enabled())
