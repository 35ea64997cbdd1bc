"""Products by quack on Hopper: kernels/linear.py's and, with GELU in their end, kernels/mlp.py's.

    out = x weight + bias + residual
    active = gelu(x weight^T + bias), and with `keep` hidden below it          (an MLP's first, forward)
    d_hidden = (d_out weight) gelu'(hidden), d_bias = its sum over the rows    (its second, backward)

quack (flash-attn-4 installs it) makes a kernel of a function of one number of the product, compiled at its
first call and kept on disk (QUACK_CACHE_DIR). Its own exact GELU calls libdevice's erf: 1.10 ms forward where
the polynomial of kernels/biased_gelu.py takes 1.03, 1.36 where it takes 1.31 backward (an H100, the shape
below).

Letters: M rows, K numbers in and out, D hidden ones.
"""

from __future__ import annotations

from pathlib import Path

import cutlass
import cutlass.cute as cute
import quack.cache
import torch
from quack.activation import relu
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import RowVecLoad, RowVecReduce
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


# The fastest of 15 to 18 on an H100 at 128 clips of 785 tokens, 768 to 3072, bf16: 0.83, 0.77 and 1.16 ms.
LAUNCH_KEEP = _hopper(128, 128, pingpong=True, clusters=(1, 2))
LAUNCH_LEAN = _hopper(128, 192, pingpong=True, clusters=(1, 2))
LAUNCH_BACKWARD = _hopper(256, 160, pingpong=False, clusters=(1, 2))
# Of six, at every shape of ViT-B (kernels/linear.py).
PRODUCT_COLUMNS = 192
LAUNCH_PRODUCT = _hopper(128, PRODUCT_COLUMNS, pingpong=True, clusters=(1, 2))


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


def _gelu_slope(x):
    positive = relu(x)
    tail = _upper_tail(positive + positive - x)
    density = cute.math.exp2(x * x * -0.7213475204444817, fastmath=True) * 0.3989422804014327
    return cutlass.select_(x > 0.0, 1.0 - tail, tail) + x * density


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
def _hidden_and_gelu(acc, bias):
    hidden = acc + bias
    return {"D": hidden, "active": _gelu(hidden)}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _gelu_alone(acc, bias):
    return {"D": _gelu(acc + bias)}


@gemm_epilogue(reduces={"d_bias": RowVecReduce("d_bias")})
def _gelu_gradient(acc, c):
    d_hidden = acc * _gelu_slope(c)
    return {"D": d_hidden, "d_bias": d_hidden}


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
    """(active (M, D), hidden (M, D) or with keep=False nothing) of halves that begin at 16 bytes."""
    inputs, bias = (x_MK, weight_DK.T), bias_D[None]
    if keep:
        made = _hidden_and_gelu(*inputs, config=LAUNCH_KEEP, tuned=False, bias=bias)
        return made["active"], made["D"]
    return _gelu_alone(*inputs, config=LAUNCH_LEAN, tuned=False, bias=bias)["D"], x_MK.new_empty(0)


def gelu_gradient(
    d_out_MK: torch.Tensor, weight_KD: torch.Tensor, hidden_MD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_hidden (M, D), d_bias (D) float32) of halves that begin at 16 bytes."""
    made = _gelu_gradient(d_out_MK, weight_KD, hidden_MD, config=LAUNCH_BACKWARD, tuned=False)
    return made["D"], made["d_bias"]
