"""Divided space-time attention behind one function, with backends chosen by name.

What is computed, and its letters: kernels/divided_attention.py.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_fast.kernels.dispatch import runs_triton
from miles_fast.kernels.divided_attention import (
    Axis,
    check_packed_qkv,
    divided_attention_reference,
    with_bias_history,
)
from miles_fast.kernels.space_attention import space_attention
from miles_fast.kernels.temporal_attention import temporal_attention


def divided_attention(
    qkv_BN3HS: Tensor, num_frames: int, axis: Axis, backend: str = "auto", query_bias: Tensor | None = None
) -> Tensor:
    """Attend along one axis; returns (B, N, H * S) in the dtype of the input.

    `query_bias` (H S,) is one that the queries already hold without its history (`takes_bias`): it gets its
    gradient.

    Backends: `triton` (this project's ops, from the packed qkv), `sdpa` (torch's fused attention), `flash`
    (flash-attn 4 or 2: CUDA, bf16 or fp16), `eager` (products and a softmax over rearranged copies, as the
    published code does it), `reference` (masked softmax over all pairs, the definition), `auto` (triton on a
    GPU, sdpa elsewhere). Raises ValueError for an unknown backend or axis, or when N is
    not 1 + a multiple of `num_frames`.
    """
    if axis not in ("time", "space"):
        raise ValueError(f"axis = {axis!r}: expected 'time' or 'space'")
    check_packed_qkv(qkv_BN3HS, num_frames)
    if backend == "triton" or (backend == "auto" and qkv_BN3HS.is_cuda):
        op = temporal_attention if axis == "time" else space_attention
        return op(qkv_BN3HS, num_frames, query_bias)
    qkv_BN3HS = with_bias_history(qkv_BN3HS, query_bias)
    if backend == "reference":
        return divided_attention_reference(qkv_BN3HS, num_frames, axis)
    if backend not in ("auto", *_ATTEND):
        raise ValueError(
            f"attention backend {backend!r}: expected auto, triton, sdpa, flash, eager or reference"
        )
    attend = _ATTEND.get(backend, _sdpa_attend)
    cls_B1HS = attend(qkv_BN3HS[:, :1, 0], qkv_BN3HS[:, :, 1], qkv_BN3HS[:, :, 2])
    if axis == "time" and backend != "eager":
        patches = _attend_time(qkv_BN3HS, num_frames)
    else:
        patches = _attend_groups(qkv_BN3HS, num_frames, axis, attend)
    return torch.cat([cls_B1HS, patches], dim=1).flatten(2)


def takes_bias(x: Tensor, backend: str) -> bool:
    """Whether attention gives a bias of the queries its gradient at no cost (this project's ops on a GPU)."""
    return torch.is_grad_enabled() and x.is_cuda and backend in ("auto", "triton") and runs_triton(x)


def require_backend(backend: str) -> None:
    """Raise ValueError saying what to install when an explicitly asked-for backend cannot run here."""
    if backend == "flash":
        _flash_function()
        if not torch.cuda.is_available():
            raise ValueError("model.attention = flash needs a CUDA GPU; use auto or sdpa")


def _attend_groups(qkv_BN3HS: Tensor, num_frames: int, axis: Axis, attend: Callable[..., Tensor]) -> Tensor:
    # A group is a frame (axis space) or a position (axis time); [CLS] joins the keys of each.
    patches_BTP3HS = qkv_BN3HS[:, 1:].unflatten(1, (num_frames, -1))
    grouped = patches_BTP3HS if axis == "space" else patches_BTP3HS.transpose(1, 2)
    num_groups = grouped.shape[1]
    group_GQ3HS = grouped.flatten(0, 1)
    cls_G1 = qkv_BN3HS[:, :1].repeat_interleave(num_groups, dim=0)
    key_value = torch.cat([cls_G1[:, :, 1:], group_GQ3HS[:, :, 1:]], dim=1)
    out_GQHS = attend(group_GQ3HS[:, :, 0], key_value[:, :, 0], key_value[:, :, 1])
    out_BGQHS = out_GQHS.unflatten(0, (-1, num_groups))
    return (out_BGQHS if axis == "space" else out_BGQHS.transpose(1, 2)).flatten(1, 2)


def _attend_time(qkv_BN3HS: Tensor, num_frames: int) -> Tensor:
    # T + 1 <= 17 keys: one multiply-and-sum per key, which torch.compile fuses into a single pass over the
    # tokens; a batched product of (T x S) by (S x T + 1) would be B * P * H launches' worth of tiny matrices.
    query, key, value = qkv_BN3HS[:, 1:].unflatten(1, (num_frames, -1)).unbind(3)
    cls_key, cls_value = qkv_BN3HS[:, :1, 1, None], qkv_BN3HS[:, :1, 2, None]
    cls_key, cls_value = cls_key.transpose(1, 2), cls_value.transpose(1, 2)
    query = query * query.shape[-1] ** -0.5
    keys = [cls_key, *(key[:, t, None] for t in range(num_frames))]
    values = [cls_value, *(value[:, t, None] for t in range(num_frames))]
    precision = torch.promote_types(qkv_BN3HS.dtype, torch.float32)
    scores = torch.stack([(query * k).sum(-1, dtype=precision) for k in keys], dim=-1)
    weights = scores.softmax(-1).to(qkv_BN3HS.dtype)
    out = sum(weights[..., j, None] * v for j, v in enumerate(values))
    return out.flatten(1, 2)


def _sdpa_attend(query_BQHS: Tensor, key_BKHS: Tensor, value_BKHS: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        query_BQHS.transpose(1, 2), key_BKHS.transpose(1, 2), value_BKHS.transpose(1, 2)
    )
    return out.transpose(1, 2)


def _eager_attend(query_BQHS: Tensor, key_BKHS: Tensor, value_BKHS: Tensor) -> Tensor:
    query_BHQS = query_BQHS.transpose(1, 2) * query_BQHS.shape[-1] ** -0.5
    weights_BHQK = (query_BHQS @ key_BKHS.permute(0, 2, 3, 1)).softmax(-1)
    return (weights_BHQK @ value_BKHS.transpose(1, 2)).transpose(1, 2)


def _flash_attend(query_BQHS: Tensor, key_BKHS: Tensor, value_BKHS: Tensor) -> Tensor:
    if query_BQHS.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"flash attention takes bf16 or fp16, not {query_BQHS.dtype}; use attention sdpa")
    out = _flash_function()(query_BQHS.contiguous(), key_BKHS.contiguous(), value_BKHS.contiguous())
    return out[0] if isinstance(out, tuple) else out


@functools.cache
def _flash_function() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "model.attention = flash needs flash-attn: pip install 'flash-attn-4[cu13]', or use auto or sdpa"
        )
    try:
        from flash_attn.cute import flash_attn_func  # flash-attn-4 has no top-level __init__
    except ImportError:
        from flash_attn import flash_attn_func
    return flash_attn_func


_ATTEND = {"sdpa": _sdpa_attend, "flash": _flash_attend, "eager": _eager_attend}
