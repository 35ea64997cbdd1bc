"""cls_row: the CLS token's share of an attention op that works through the tokens in chunks.

The CLS query attends to every key and the CLS key is seen by every query, so each program of an attention
kernel meets a part of both. It leaves that part, in float32, for one of two small kernels:

    combine_cls_output      out[b, 0, h] = sum_c 2^(max[c] - lse) values[c],  lse = log2 sum_c 2^max[c] sum[c]
    combine_cls_gradients   d_qkv[b, 0, :, h] = sum_c partial[c]

Scores are in base 2 (their scale includes log2 e), as are `max` and `lse`. Chunk c contributes, over its own
keys j, max[c] = max_j s_j, sum[c] = sum_j 2^(s_j - max[c]) and values[c] = sum_j 2^(s_j - max[c]) v_j. Of all
chunks exactly one counts the CLS key as the CLS query's own. The order of summation is fixed: no atomics, the
same bits every time.

Letters beyond the README's: H heads, S head width, chunks c.
"""

from __future__ import annotations

import torch

from miles_fast.kernels.dispatch import jit, tl, triton

# Not yet measured: reasoned from bytes. 16 chunks x 64 float32 are two 16-byte loads a thread of 2 warps, and
# there are enough programs (B H, backward 3 B H) to fill the GPU with small ones.
_CHUNKS_PER_LOAD = 16
_NUM_WARPS = 2


@jit
def _combine_cls_output_kernel(
    max_ptr,
    sum_ptr,
    values_ptr,
    out_ptr,
    lse_ptr,
    num_chunks,
    num_tokens,
    H: tl.constexpr,
    S: tl.constexpr,
    ALL_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    clip, head = pid // H, pid % H
    every_chunk = tl.arange(0, ALL_CHUNKS)
    exists = every_chunk < num_chunks
    maxima = tl.load(max_ptr + pid * num_chunks + every_chunk, mask=exists, other=float("-inf"))
    totals = tl.load(sum_ptr + pid * num_chunks + every_chunk, mask=exists, other=0.0)
    peak = tl.max(maxima, axis=0)
    lse = peak + tl.log2(tl.sum(totals * tl.exp2(maxima - peak), axis=0))
    tl.store(lse_ptr + pid, lse)

    column = tl.arange(0, BLOCK_S)
    out = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, num_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        stored = chunk < num_chunks
        highest = tl.load(max_ptr + pid * num_chunks + chunk, mask=stored, other=float("-inf"))
        values = tl.load(
            values_ptr + (pid * num_chunks + chunk[:, None]) * S + column[None, :],
            mask=stored[:, None] & (column < S)[None, :],
            other=0.0,
        )
        out += tl.sum(tl.exp2(highest - lse)[:, None] * values, axis=0)
    tl.store(out_ptr + clip * num_tokens * (H * S) + head * S + column, out, mask=column < S)


@jit
def _combine_cls_gradients_kernel(
    partial_ptr,
    d_qkv_ptr,
    num_chunks,
    num_tokens,
    H: tl.constexpr,
    S: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    which, clip_and_head = pid % 3, pid // 3
    clip, head = clip_and_head // H, clip_and_head % H
    column = tl.arange(0, BLOCK_S)
    gradient = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, num_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        row = (clip_and_head * num_chunks + chunk) * 3 + which
        partial = tl.load(
            partial_ptr + row[:, None] * S + column[None, :],
            mask=(chunk < num_chunks)[:, None] & (column < S)[None, :],
            other=0.0,
        )
        gradient += tl.sum(partial, axis=0)
    cls_token = d_qkv_ptr + clip * num_tokens * (3 * H * S)
    tl.store(cls_token + which * (H * S) + head * S + column, gradient, mask=column < S)


def combine_cls_output(
    max_BHC: torch.Tensor, sum_BHC: torch.Tensor, values_BHCS: torch.Tensor, out_BND: torch.Tensor
) -> torch.Tensor:
    """Write out[:, 0] (out (B, N, H * S), contiguous) and return its log-sum-exp, (B, H) float32, base 2."""
    B, H, C, S = values_BHCS.shape
    lse_BH = torch.empty((B, H), dtype=torch.float32, device=out_BND.device)
    _combine_cls_output_kernel[(B * H,)](
        max_BHC,
        sum_BHC,
        values_BHCS,
        out_BND,
        lse_BH,
        C,
        out_BND.shape[1],
        H=H,
        S=S,
        ALL_CHUNKS=triton.next_power_of_2(C),
        CHUNKS=_CHUNKS_PER_LOAD,
        BLOCK_S=triton.next_power_of_2(S),
        num_warps=_NUM_WARPS,
    )
    return lse_BH


def combine_cls_gradients(partial_BHC3S: torch.Tensor, d_qkv_BN3HS: torch.Tensor) -> None:
    """Write d_qkv[:, 0] (contiguous): the sums over the chunks' float32 shares of d_q, d_k and d_v."""
    B, H, C, _, S = partial_BHC3S.shape
    _combine_cls_gradients_kernel[(B * H * 3,)](
        partial_BHC3S,
        d_qkv_BN3HS,
        C,
        d_qkv_BN3HS.shape[1],
        H=H,
        S=S,
        CHUNKS=_CHUNKS_PER_LOAD,
        BLOCK_S=triton.next_power_of_2(S),
        num_warps=_NUM_WARPS,
    )
