"""Products by quack on Hopper: kernels/linear.py's and, with GELU in their end, kernels/mlp.py's.

    out = x weight + bias + residual
    active = gelu(hidden) and with `keep` slope = gelu'(hidden)         (an MLP's first, forward)
    d_hidden = (d_out weight) slope, d_bias = its sum over the rows     (its second, backward)

with hidden = x weight^T + bias.

The first two of 8-bit floats too, times a scale of each row of x and of the weight (kernels/fp8_linear.py,
kernels/fp8_mlp.py).

quack (flash-attn-4 installs it) makes a kernel of a function of one number of the product, compiled at its
first call and kept on disk (QUACK_CACHE_DIR). Its own exact GELU calls libdevice's erf: 1.10 ms where the
polynomial of kernels/biased_gelu.py takes 1.03 (an H100, the shape below, hidden instead of the slope).

Letters: M rows, K numbers in and out, D hidden ones.
"""

from __future__ import annotations

from pathlib import Path

import cutlass
import cutlass.cute as cute
import quack.cache
import torch
from quack.activation import relu
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.ops import ColVecLoad, RowVecLoad, RowVecReduce
from quack.gemm_config import GemmConfig

# A kernel on disk is of these lines too, where they are installed beside quack.
quack.cache.EXTRA_SOURCE_DIRS.append(Path(__file__).parent)


def _hopper(rows: int, columns: int, *, pingpong: bool, clusters: tuple[int, int]) -> GemmConfig:
    return GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        cluster_m=clusters[0],
        cluster_n=clusters[1],
        is_dynamic_persistent=False,
        device_capacity=9,
    )


# The fastest of 7, 18 and 8 on an H100 at 128 clips of 785 tokens, 768 to 3072, bf16: 1.01, 0.77 and 0.89 ms.
LAUNCH_KEEP = _hopper(128, 128, pingpong=True, clusters=(1, 2))
LAUNCH_LEAN = _hopper(128, 192, pingpong=True, clusters=(1, 2))
LAUNCH_BACKWARD = _hopper(128, 192, pingpong=True, clusters=(1, 2))
# Of six, at every shape of ViT-B (kernels/linear.py).
PRODUCT_COLUMNS = 192
LAUNCH_PRODUCT = _hopper(128, PRODUCT_COLUMNS, pingpong=True, clusters=(1, 2))
# Of 8-bit floats, of six on an H100 at as many rows: 768 to 2304 0.332 ms, where torch._scaled_mm takes
# 0.374; 3072 to 768 0.364 for 0.341 without the residual, 0.356 for 0.486 with it.
LAUNCH_SCALED = _hopper(128, PRODUCT_COLUMNS, pingpong=True, clusters=(2, 1))
# 768 to 3072, of six: 0.906 ms with active and its slope.
LAUNCH_SCALED_GELU = _hopper(256, 128, pingpong=False, clusters=(1, 2))


def _upper_tail(a):
    """1 - Phi(a) of a >= 0: `biased_gelu._upper_tail`, whose numbers these are."""
    q = a * -1.83481018e-6 + 6.15982688e-5
    q = q * a + -9.30524655e-4
    q = q * a + 8.50789019e-3
    q = q * a + -5.39600677e-2
    q = q * a + -0.458464395
    q = q * a + -1.15125104
    q = q * a + -0.999995295
    return cute.math.exp2(q, fastmath=True)


def _gelu(x):
    positive = relu(x)
    size = positive + positive - x
    return positive - size * _upper_tail(size)


def _gelu_and_slope(x):
    positive = relu(x)
    size = positive + positive - x
    tail = _upper_tail(size)
    density = cute.math.exp2(x * x * -0.7213475204444817, fastmath=True) * 0.3989422804014327
    return positive - size * tail, cutlass.select_(x > 0.0, 1.0 - tail, tail) + x * density


@gemm_epilogue()
def _product(acc):
    return {"D": acc}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _product_and_bias(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _product_bias_and_residual(acc, c, bias):
    return {"D": acc + bias + c}


@gemm_epilogue(outputs=("active",), ops={"bias": RowVecLoad("bias")})
def _gelu_and_its_slope(acc, bias):
    active, slope = _gelu_and_slope(acc + bias)
    return {"D": slope, "active": active}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _gelu_alone(acc, bias):
    return {"D": _gelu(acc + bias)}


@gemm_epilogue(reduces={"d_bias": RowVecReduce("d_bias")})
def _product_slope(acc, c):
    d_hidden = acc * c
    return {"D": d_hidden, "d_bias": d_hidden}


_SCALED = {"rows": ColVecLoad("rows"), "columns": RowVecLoad("columns"), "bias": RowVecLoad("bias")}


@gemm_epilogue(ops=_SCALED)
def _scaled_product(acc, rows, columns, bias):
    return {"D": acc * rows * columns + bias}


@gemm_epilogue(ops=_SCALED)
def _scaled_product_and_residual(acc, c, rows, columns, bias):
    return {"D": acc * rows * columns + bias + c}


_SCALED_GELU = {**_SCALED, "inverse": ColVecLoad("inverse")}


@gemm_epilogue(outputs=("active", "active8"), ops=_SCALED_GELU)
def _scaled_gelu_and_its_slope(acc, rows, columns, bias, inverse):
    active, slope = _gelu_and_slope(acc * rows * columns + bias)
    return {"D": slope, "active": active, "active8": active * inverse}


@gemm_epilogue(ops=_SCALED_GELU)
def _scaled_gelu_alone(acc, rows, columns, bias, inverse):
    return {"D": _gelu(acc * rows * columns + bias) * inverse}


def product(
    x_MK: torch.Tensor, weight_KN: torch.Tensor, bias_N: torch.Tensor | None, residual_MN: torch.Tensor | None
) -> torch.Tensor:
    """x weight + bias (+ residual, only with a bias), (M, N), of halves that begin at 16 bytes.

    `weight_KN` may be a transposed view.
    """
    options = {"config": LAUNCH_PRODUCT, "tuned": False}
    if bias_N is None:
        assert residual_MN is None
        return _product(x_MK, weight_KN, **options)["D"]
    if residual_MN is None:
        return _product_and_bias(x_MK, weight_KN, bias=bias_N[None], **options)["D"]
    return _product_bias_and_residual(x_MK, weight_KN, residual_MN, bias=bias_N[None], **options)["D"]


def linear_gelu(
    x_MK: torch.Tensor, weight_DK: torch.Tensor, bias_D: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(active (M, D), slope (M, D) or with keep=False nothing) of halves that begin at 16 bytes."""
    inputs, bias = (x_MK, weight_DK.T), bias_D[None]
    if keep:
        made = _gelu_and_its_slope(*inputs, config=LAUNCH_KEEP, tuned=False, bias=bias)
        return made["active"], made["D"]
    return _gelu_alone(*inputs, config=LAUNCH_LEAN, tuned=False, bias=bias)["D"], x_MK.new_empty(0)


def product_slope(
    d_out_MK: torch.Tensor, weight_KD: torch.Tensor, slope_MD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_hidden (M, D), d_bias (D) float32) of halves that begin at 16 bytes."""
    made = _product_slope(d_out_MK, weight_KD, slope_MD, config=LAUNCH_BACKWARD, tuned=False)
    return made["D"], made["d_bias"]


def _scaled(
    compute: EpiMod,
    x8_MK: torch.Tensor,
    w8_NK: torch.Tensor,
    out_MN: torch.Tensor,
    residual_MN: torch.Tensor | None,
    launch: GemmConfig,
    **ends: torch.Tensor,
) -> torch.Tensor:
    """Write `out_MN`, the tensor cores adding the products as torch._scaled_mm's do: else it takes 4 to 6 ms.

    `compute` itself, called, has no such option.
    """
    compute.gemm(
        *(x8_MK, w8_NK, out_MN, residual_MN),
        epi_args={name: end[None] if end.ndim == 1 else end for name, end in ends.items()},
        tile_M=launch.tile_m,
        tile_N=launch.tile_n,
        cluster_M=launch.cluster_m,
        cluster_N=launch.cluster_n,
        pingpong=launch.pingpong,
        post_init_attrs=(("fp8_slow_accum", False),),
    )
    return out_MN


def scaled_product(
    x8_MK: torch.Tensor,
    x_scale_M: torch.Tensor,
    w8_NK: torch.Tensor,
    w_scale_N: torch.Tensor,
    bias_N: torch.Tensor,
    residual_MN: torch.Tensor | None,
) -> torch.Tensor:
    """x_scale w_scale (x weight^T) + bias (+ residual), (M, N) in the bias' dtype.

    Of e4m3 numbers and float32 scales; all begin at 16 bytes.
    """
    compute = _scaled_product if residual_MN is None else _scaled_product_and_residual
    out_MN = bias_N.new_empty(len(x8_MK), len(w8_NK))
    ends = {"rows": x_scale_M, "columns": w_scale_N, "bias": bias_N}
    return _scaled(compute, x8_MK, w8_NK, out_MN, residual_MN, LAUNCH_SCALED, **ends)


def scaled_linear_gelu(
    x8_MK: torch.Tensor,
    w8_DK: torch.Tensor,
    bias_D: torch.Tensor,
    x_scale_M: torch.Tensor,
    w_scale_D: torch.Tensor,
    out_scale_M: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E4m3 of active / out_scale (M, D) and, with keep=False nothing, slope and active in the bias' dtype.

    Of e4m3 numbers and float32 scales; all begin at 16 bytes.
    """
    shape = len(x8_MK), len(w8_DK)
    active8_MD = x8_MK.new_empty(shape)
    slope_MD, active_MD = (bias_D.new_empty(shape if keep else 0) for _ in range(2))
    ends = {"rows": x_scale_M, "columns": w_scale_D, "bias": bias_D, "inverse": out_scale_M.reciprocal()}
    if keep:
        ends |= {"active": active_MD, "active8": active8_MD}
        _scaled(_scaled_gelu_and_its_slope, x8_MK, w8_DK, slope_MD, None, LAUNCH_SCALED_GELU, **ends)
    else:
        _scaled(_scaled_gelu_alone, x8_MK, w8_DK, active8_MD, None, LAUNCH_SCALED_GELU, **ends)
    return active8_MD, slope_MD, active_MD
