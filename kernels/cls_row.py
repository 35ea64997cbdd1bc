"""The CLS row of divided attention: what its chunks of the clip add up to.

The CLS token attends to the whole clip, but an attention program sees a part of it (a chunk). Each chunk
leaves float32 partials, and these kernels add them in the order of the chunks: no atomics, the same bits
every time. With C chunks of one clip and head:

    m = max_c m_c    w_c = 2^(m_c - m)    l = sum_c w_c l_c
    out[b, 0, h] = sum_c w_c o_c / l      lse = m + log2 l
    d_qkv[b, 0, part, h] = sum_c partial[b, h, c, part]

m_c = max_j s_j, l_c = sum_j 2^(s_j - m_c) and o_c = sum_j 2^(s_j - m_c) v_j run over the chunk's keys; scores
s are in units of 2, q . k * log2(e) / sqrt(S), and so is lse. A chunk holds at least one allowed key of the
CLS query (kept by the attention ops); m_c is then finite.
"""

from __future__ import annotations

import torch

from miles_fast.kernels.dispatch import jit, tl, triton

# A tile of 16 chunks of 64 numbers is 8 numbers a thread, and the trainer's 4 to 16 chunks are one step.
_CHUNKS_PER_STEP = 16


@jit
def _combine_output_kernel(
    chunk_max_ptr,
    chunk_sum_ptr,
    chunk_value_ptr,
    out_ptr,
    lse_ptr,
    C,
    H,
    S,
    out_stride_clip,
    lse_stride_clip,
    lse_stride_head,
    CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip, head = row // H, row % H
    chunk, column = tl.arange(0, CHUNKS), tl.arange(0, BLOCK_S)
    highest = tl.full([CHUNKS], float("-inf"), tl.float32)
    for start in range(0, C, CHUNKS):
        present = start + chunk < C
        chunk_max = tl.load(chunk_max_ptr + row * C + start + chunk, mask=present, other=float("-inf"))
        highest = tl.maximum(highest, chunk_max)
    row_max = tl.max(highest, axis=0)
    row_sum = 0.0
    value = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, C, CHUNKS):
        present = start + chunk < C
        c = row * C + start + chunk
        weight = tl.exp2(tl.load(chunk_max_ptr + c, mask=present, other=float("-inf")) - row_max)
        row_sum += tl.sum(weight * tl.load(chunk_sum_ptr + c, mask=present, other=0.0), axis=0)
        chunk_value = tl.load(
            chunk_value_ptr + c[:, None] * S + column[None, :],
            mask=present[:, None] & (column < S)[None, :],
            other=0.0,
        )
        value += tl.sum(weight[:, None] * chunk_value, axis=0)
    tl.store(out_ptr + clip * out_stride_clip + head * S + column, value / row_sum, mask=column < S)
    tl.store(lse_ptr + clip * lse_stride_clip + head * lse_stride_head, row_max + tl.log2(row_sum))


@jit
def _combine_gradient_kernel(
    partial_ptr, d_qkv_ptr, C, H, S, d_qkv_stride_clip, CHUNKS: tl.constexpr, BLOCK_S: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    row, part = pid // 3, pid % 3
    clip, head = row // H, row % H
    chunk, column = tl.arange(0, CHUNKS), tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, C, CHUNKS):
        present = start + chunk < C
        c = (row * C + start + chunk) * 3 + part
        values = tl.load(
            partial_ptr + c[:, None] * S + column[None, :],
            mask=present[:, None] & (column < S)[None, :],
            other=0.0,
        )
        total += tl.sum(values, axis=0)
    tl.store(d_qkv_ptr + clip * d_qkv_stride_clip + (part * H + head) * S + column, total, mask=column < S)


def combine_cls_output(
    chunk_max_BHC: torch.Tensor,
    chunk_sum_BHC: torch.Tensor,
    chunk_value_BHCS: torch.Tensor,
    out_BND: torch.Tensor,
    lse_BH: torch.Tensor,
) -> None:
    """Write out[:, 0] (D = H * S, contiguous rows) and lse (any strides) from contiguous float32 partials."""
    B, H, C, S = chunk_value_BHCS.shape
    _combine_output_kernel[(B * H,)](
        chunk_max_BHC,
        chunk_sum_BHC,
        chunk_value_BHCS,
        out_BND,
        lse_BH,
        C,
        H,
        S,
        out_BND.stride(0),
        *lse_BH.stride(),
        CHUNKS=_CHUNKS_PER_STEP,
        BLOCK_S=triton.next_power_of_2(S),
        num_warps=4,
    )


def combine_cls_gradient(partial_BHC3S: torch.Tensor, d_qkv_BN3HS: torch.Tensor) -> None:
    """Write d_qkv[:, 0] of a contiguous gradient from contiguous float32 partials of d_q, d_k and d_v."""
    B, H, C, _, S = partial_BHC3S.shape
    _combine_gradient_kernel[(B * H * 3,)](
        partial_BHC3S,
        d_qkv_BN3HS,
        C,
        H,
        S,
        d_qkv_BN3HS.stride(0),
        CHUNKS=_CHUNKS_PER_STEP,
        BLOCK_S=triton.next_power_of_2(S),
        num_warps=4,
    )
