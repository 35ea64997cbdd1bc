"""What divided space-time attention computes, and what its two ops (temporal, space) accept.

Tokens are [CLS], then frame-major patches (frame, position): N = 1 + T P. The CLS query attends to all N
tokens along either axis; a patch query attends to CLS and to the patches at its position (`time`, T + 1 keys)
or in its frame (`space`, P + 1 keys) (spec/miles.md 1.1).

    out[b, n, h] = sum over allowed j of softmax_j(q[b, n, h] . k[b, j, h] / sqrt(S)) v[b, j, h]

Of a bias that the qkv layer added, only the queries' part takes the ops' work: one of the keys moves all
scores of a query alike and changes nothing (its gradient is 0), one of the values adds itself to every out
(its gradient is the sum of d_out).

Letters beyond the README's: P positions per frame, H heads, S head width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Axis = Literal["time", "space"]


def divided_attention_reference(qkv_BN3HS: torch.Tensor, num_frames: int, axis: Axis) -> torch.Tensor:
    """The definition, (B, N, H * S): softmax over the allowed pairs of all N tokens, in the input's dtype."""
    query, key, value = qkv_BN3HS.permute(2, 0, 3, 1, 4)
    num_patches = qkv_BN3HS.shape[1] - 1
    patch = torch.arange(num_patches, device=qkv_BN3HS.device)
    per_frame = num_patches // num_frames
    group = patch % per_frame if axis == "time" else patch // per_frame
    allowed = F.pad(group[:, None] == group[None, :], (1, 0, 1, 0), value=True)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def with_bias_history(qkv_BN3HS: torch.Tensor, query_bias: torch.Tensor | None) -> torch.Tensor:
    """The same numbers, whose gradient also reaches a `query_bias` (H S,) that they already hold."""
    if query_bias is None:
        return qkv_BN3HS
    history = F.pad(query_bias - query_bias.detach(), (0, 2 * len(query_bias)))
    return qkv_BN3HS + history.view(qkv_BN3HS.shape[2:])


def check_packed_qkv(qkv_BN3HS: torch.Tensor, num_frames: int) -> None:
    """Raise ValueError unless the qkv is a floating-point (B, 1 + T P, 3, H, S) with T = `num_frames`."""
    if qkv_BN3HS.dim() != 5 or qkv_BN3HS.shape[2] != 3 or not qkv_BN3HS.is_floating_point():
        raise ValueError(
            f"qkv must be a floating-point (B, N, 3, H, S), got {qkv_BN3HS.dtype} {tuple(qkv_BN3HS.shape)}"
        )
    num_tokens = qkv_BN3HS.shape[1]
    if num_frames < 1 or num_tokens <= num_frames or (num_tokens - 1) % num_frames:
        raise ValueError(f"{num_tokens} tokens are not 1 + a multiple of {num_frames} frames")
