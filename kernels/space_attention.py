"""space_attention: divided attention along space, straight from the packed qkv.

    out[b, n, h] = sum_j W_nj v[b, j, h],    W_nj = 2^(s_nj - lse_n),
    s_nj = q[b, n, h] . k[b, j, h] * log2(e) / sqrt(S)

A patch query n attends to the P patches j of its own frame and to CLS, the CLS query to all N = 1 + T P
tokens. qkv (B, N, 3, H, S) is read where it lies, out (B, N, H * S) is written whole, and backward writes one
packed d_qkv: nothing is rearranged, concatenated or transposed in memory.

A frame is P + 1 rows: its patches, then CLS, whose address is another one. The CLS key is then one more
column of a tile, and the CLS query one more row, of which each frame yields a part; kernels/cls_row.py adds
the parts. The pair (CLS, CLS) counts in frame 0.

Forward saves lse (B, H, N) float32. Backward:

    delta_n = sum_S d_out[n] out[n]        dX_nj = W_nj (d_out[n] . v[j] - delta_n)
    d_q[n] = sum_j dX_nj k[j] / sqrt(S)    d_k[j] = sum_n dX_nj q[n] / sqrt(S)    d_v[j] = sum_n W_nj d_out[n]

in two kernels: programs of the first own queries (d_q, and delta for the second), programs of the second own
keys (d_k, d_v). Seven products instead of five, but no d_q passes between programs. W and dX are rounded to
the input's dtype for the products; everything else is float32. With `bias`, which qkv already holds, they
also leave the sums of their d_q, d_k and d_v over rows, which add up to its gradient.

Letters beyond the README's: P positions per frame, H heads, S head width.
"""

from __future__ import annotations

import math

import torch

from miles_fast.kernels.cls_row import combine_cls_gradient, combine_cls_output
from miles_fast.kernels.dispatch import INTERPRETED, jit, runs_triton, tl, triton
from miles_fast.kernels.divided_attention import (
    check_packed_qkv,
    divided_attention_reference,
    with_bias_history,
)

# (P + 1, S), each rounded up to a power of two -> (query rows, key rows, warps per program, pipeline stages,
# most registers per thread or None), for 16-bit numbers; read at every call.
# Measured on an H100 at 256 frames of 196 patches and 12 heads, bf16, by `python benchmarks/micro.py --op
# space_attention --first --sweep`: forward 0.203 ms; in a training step 0.19 forward, 0.23 for d_q and 0.32
# for d_k and d_v. 64 rows on 4 warps are one wgmma tile.
LAUNCH_FORWARD = {(256, 64): (64, 64, 4, 3, None)}
LAUNCH_BACKWARD_QUERY = {(256, 64): (128, 64, 4, 3, None)}
LAUNCH_BACKWARD_KEY = {(256, 64): (64, 64, 4, 3, None)}


def space_attention_reference(
    qkv_BN3HS: torch.Tensor, num_frames: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """out (B, N, H S): the definition, in any dtype, differentiable by autograd."""
    return divided_attention_reference(with_bias_history(qkv_BN3HS, bias), num_frames, "space")


# The interpreter keeps a bfloat16 as its bits, and its tl.dot multiplies the bits.
_WIDENS = tl and tl.constexpr(INTERPRETED)


@jit
def _place(num_tokens, P: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    # Programs of one frame and head are neighbours, then its heads: they meet in L2.
    pid = tl.program_id(0)
    blocks = (P + BLOCK) // BLOCK
    first_row = pid % blocks * BLOCK
    pid = pid // blocks
    T = (num_tokens - 1) // P
    return (pid // H // T).to(tl.int64), (pid // H % T).to(tl.int64), pid % H, first_row


@jit
def _rows(
    ptr, token, present, MASKED: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr
):
    # Tokens of one head. A mask that is true everywhere would still cost registers in the inner loop.
    column = tl.arange(0, BLOCK_S)
    pointers = ptr + token[:, None] * STRIDE + column[None, :]
    if MASKED:
        return tl.load(pointers, mask=present[:, None] & (column < S)[None, :], other=0.0)
    if S < BLOCK_S:
        return tl.load(pointers, mask=(column < S)[None, :], other=0.0)
    return tl.load(pointers)


@jit
def _product(a, b, total):
    if _WIDENS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def _attend(q, k, v, allowed, row_max, row_sum, out, scale, MASKED: tl.constexpr):
    scores = _product(q, tl.trans(k), None)
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, axis=1)
    out = _product(weights.to(v.dtype), v, out * shrink[:, None])
    return new_max, row_sum, out


@jit
def _attend_kernel(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    cls_max_ptr,
    cls_sum_ptr,
    cls_value_ptr,
    num_tokens,
    scale,
    P: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    clip, frame, head, first_query = _place(num_tokens, P, H, BLOCK_Q)
    D: tl.constexpr = H * S
    ROW: tl.constexpr = 3 * D
    FULL: tl.constexpr = P // BLOCK_K * BLOCK_K
    first_token, T = 1 + frame * P, (num_tokens - 1) // P
    q_ptr = qkv_ptr + clip * num_tokens * ROW + head * S
    k_ptr, v_ptr = q_ptr + D, q_ptr + 2 * D

    query, tail = first_query + tl.arange(0, BLOCK_Q), FULL + tl.arange(0, TAIL)
    query_token = tl.where(query < P, first_token + query, 0)
    tail_token = tl.where(tail < P, first_token + tail, 0)
    q = _rows(q_ptr, query_token, query <= P, True, ROW, S, BLOCK_S)
    k_tail = _rows(k_ptr, tail_token, tail <= P, True, ROW, S, BLOCK_S)
    v_tail = _rows(v_ptr, tail_token, tail <= P, True, ROW, S, BLOCK_S)

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    for first_key in tl.range(0, FULL, BLOCK_K, num_stages=STAGES):
        first, key = (first_token + first_key) * ROW, tl.arange(0, BLOCK_K)
        k = _rows(k_ptr + first, key, None, False, ROW, S, BLOCK_S)
        v = _rows(v_ptr + first, key, None, False, ROW, S, BLOCK_S)
        row_max, row_sum, out = _attend(q, k, v, None, row_max, row_sum, out, scale, False)
    # The tail comes last: it may hold nothing but the forbidden pair (CLS, CLS), and by then the maximum is
    # finite.
    allowed = (tail <= P)[None, :] & ((query < P)[:, None] | (tail < P)[None, :] | (frame == 0))
    row_max, row_sum, out = _attend(q, k_tail, v_tail, allowed, row_max, row_sum, out, scale, True)

    column = tl.arange(0, BLOCK_S)
    out_ptr += (clip * num_tokens + first_token + first_query) * D + head * S
    out_ptrs = out_ptr + tl.arange(0, BLOCK_Q)[:, None] * D + column[None, :]
    tl.store(out_ptrs, out / row_sum[:, None], mask=(query < P)[:, None] & (column < S)[None, :])
    lse_ptrs = lse_ptr + (clip * H + head) * num_tokens + query_token
    tl.store(lse_ptrs, row_max + tl.log2(row_sum), mask=query < P)
    if first_query + BLOCK_Q > P:
        chunk = (clip * H + head) * T + frame
        tl.store(cls_max_ptr + chunk, tl.sum(tl.where(query == P, row_max, 0.0), axis=0))
        tl.store(cls_sum_ptr + chunk, tl.sum(tl.where(query == P, row_sum, 0.0), axis=0))
        value = tl.sum(tl.where((query == P)[:, None], out, 0.0), axis=0)
        tl.store(cls_value_ptr + chunk * S + column, value, mask=column < S)


@jit
def _query_gradient(q, k, v, d_out, lse, delta, allowed, d_q, scale, MASKED: tl.constexpr):
    weights = tl.exp2(_product(q, tl.trans(k), None) * scale - lse[:, None])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    d_scores = weights * (_product(d_out, tl.trans(v), None) - delta[:, None])
    return _product(d_scores.to(k.dtype), k, d_q)


@jit
def _query_gradient_kernel(
    qkv_ptr,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    row_starts_ptr,
    d_qkv_ptr,
    cls_partial_ptr,
    bias_partial_ptr,
    num_tokens,
    scale,
    d_scale,
    P: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    clip, frame, head, first_query = _place(num_tokens, P, H, BLOCK_Q)
    D: tl.constexpr = H * S
    ROW: tl.constexpr = 3 * D
    FULL: tl.constexpr = P // BLOCK_K * BLOCK_K
    first_token, T = 1 + frame * P, (num_tokens - 1) // P
    q_ptr = qkv_ptr + clip * num_tokens * ROW + head * S
    k_ptr, v_ptr = q_ptr + D, q_ptr + 2 * D
    out_offset = clip * num_tokens * D + head * S

    query, tail = first_query + tl.arange(0, BLOCK_Q), FULL + tl.arange(0, TAIL)
    query_token = tl.where(query < P, first_token + query, 0)
    tail_token = tl.where(tail < P, first_token + tail, 0)
    d_out = _rows(d_out_ptr + out_offset, query_token, query <= P, True, D, S, BLOCK_S)
    out = _rows(out_ptr + out_offset, query_token, query <= P, True, D, S, BLOCK_S)
    q = _rows(q_ptr, query_token, query <= P, True, ROW, S, BLOCK_S)
    k_tail = _rows(k_ptr, tail_token, tail <= P, True, ROW, S, BLOCK_S)
    v_tail = _rows(v_ptr, tail_token, tail <= P, True, ROW, S, BLOCK_S)
    row = (clip * H + head) * num_tokens + query_token
    lse = tl.load(lse_ptr + row, mask=query <= P, other=float("inf"))
    delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
    # What the products of _key_gradient start from. All frames store the same numbers for CLS.
    tl.store(row_starts_ptr + row * 2, -lse / scale, mask=query <= P)
    tl.store(row_starts_ptr + row * 2 + 1, -delta, mask=query <= P)

    d_q = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    for first_key in tl.range(0, FULL, BLOCK_K, num_stages=STAGES):
        first, key = (first_token + first_key) * ROW, tl.arange(0, BLOCK_K)
        k = _rows(k_ptr + first, key, None, False, ROW, S, BLOCK_S)
        v = _rows(v_ptr + first, key, None, False, ROW, S, BLOCK_S)
        d_q = _query_gradient(q, k, v, d_out, lse, delta, None, d_q, scale, False)
    allowed = (tail <= P)[None, :] & ((query < P)[:, None] | (tail < P)[None, :] | (frame == 0))
    d_q = _query_gradient(q, k_tail, v_tail, d_out, lse, delta, allowed, d_q, scale, True) * d_scale

    column = tl.arange(0, BLOCK_S)
    if WITH_BIAS:
        # Rows behind CLS have no gradient: their weights are 0.
        blocks: tl.constexpr = (P + BLOCK_Q) // BLOCK_Q
        block = ((clip * H + head) * T + frame) * blocks + first_query // BLOCK_Q
        tl.store(bias_partial_ptr + block * S + column, tl.sum(d_q, axis=0), mask=column < S)
    d_q_ptr = d_qkv_ptr + (clip * num_tokens + first_token + first_query) * ROW + head * S
    d_q_ptrs = d_q_ptr + tl.arange(0, BLOCK_Q)[:, None] * ROW + column[None, :]
    tl.store(d_q_ptrs, d_q, mask=(query < P)[:, None] & (column < S)[None, :])
    if first_query + BLOCK_Q > P:
        share_ptrs = cls_partial_ptr + ((clip * H + head) * T + frame) * 3 * S + column
        tl.store(share_ptrs, tl.sum(tl.where((query == P)[:, None], d_q, 0.0), axis=0), mask=column < S)


@jit
def _row_starts(row_starts_ptr, token):
    # One load for the pair: of a vector alone, every thread that needs a number would copy it (triton 3.6).
    return tl.split(tl.load(row_starts_ptr + token[:, None] * 2 + tl.arange(0, 2)[None, :]))


@jit
def _key_gradient(q, k, v, d_out, start, d_start, allowed, d_k, d_v, scale, MASKED: tl.constexpr):
    # Both products start from what would be subtracted from their columns, which then holds no registers.
    tile: tl.constexpr = [k.shape[0], q.shape[0]]
    scores = _product(k, tl.trans(q), tl.broadcast_to(start[None, :], tile))
    weights = tl.exp2(scores * scale)
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    d_v = _product(weights.to(d_out.dtype), d_out, d_v)
    d_scores = weights * _product(v, tl.trans(d_out), tl.broadcast_to(d_start[None, :], tile))
    d_k = _product(d_scores.to(q.dtype), q, d_k)
    return d_k, d_v


@jit
def _key_gradient_kernel(
    qkv_ptr,
    d_out_ptr,
    row_starts_ptr,
    d_qkv_ptr,
    cls_partial_ptr,
    bias_partial_ptr,
    num_tokens,
    scale,
    d_scale,
    P: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    clip, frame, head, first_key = _place(num_tokens, P, H, BLOCK_K)
    D: tl.constexpr = H * S
    ROW: tl.constexpr = 3 * D
    FULL: tl.constexpr = P // BLOCK_Q * BLOCK_Q
    first_token, T = 1 + frame * P, (num_tokens - 1) // P
    q_ptr = qkv_ptr + clip * num_tokens * ROW + head * S
    k_ptr, v_ptr = q_ptr + D, q_ptr + 2 * D
    d_out_ptr += clip * num_tokens * D + head * S
    row_starts_ptr += (clip * H + head) * num_tokens * 2

    key, tail = first_key + tl.arange(0, BLOCK_K), FULL + tl.arange(0, TAIL)
    key_token = tl.where(key < P, first_token + key, 0)
    tail_token = tl.where(tail < P, first_token + tail, 0)
    k = _rows(k_ptr, key_token, key <= P, True, ROW, S, BLOCK_S)
    v = _rows(v_ptr, key_token, key <= P, True, ROW, S, BLOCK_S)
    q_tail = _rows(q_ptr, tail_token, tail <= P, True, ROW, S, BLOCK_S)
    d_out_tail = _rows(d_out_ptr, tail_token, tail <= P, True, D, S, BLOCK_S)

    d_k = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)
    d_v = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)
    for first_query in tl.range(0, FULL, BLOCK_Q, num_stages=STAGES):
        first, query = first_token + first_query, tl.arange(0, BLOCK_Q)
        q = _rows(q_ptr + first * ROW, query, None, False, ROW, S, BLOCK_S)
        d_out = _rows(d_out_ptr + first * D, query, None, False, D, S, BLOCK_S)
        start, d_start = _row_starts(row_starts_ptr + first * 2, query)
        d_k, d_v = _key_gradient(q, k, v, d_out, start, d_start, None, d_k, d_v, scale, False)
    start, d_start = _row_starts(row_starts_ptr, tail_token)
    allowed = (tail <= P)[None, :] & ((tail < P)[None, :] | (key < P)[:, None] | (frame == 0))
    d_k, d_v = _key_gradient(q_tail, k, v, d_out_tail, start, d_start, allowed, d_k, d_v, scale, True)
    d_k *= d_scale

    column = tl.arange(0, BLOCK_S)
    if WITH_BIAS:
        # Rows behind CLS hold what became of their weights, which are not 0.
        blocks: tl.constexpr = (P + BLOCK_K) // BLOCK_K
        block = (((clip * H + head) * T + frame) * blocks + first_key // BLOCK_K) * 2
        present = (key <= P)[:, None]
        bias_ptrs = bias_partial_ptr + block * S + column
        tl.store(bias_ptrs, tl.sum(tl.where(present, d_k, 0.0), axis=0), mask=column < S)
        tl.store(bias_ptrs + S, tl.sum(tl.where(present, d_v, 0.0), axis=0), mask=column < S)
    inside = (key < P)[:, None] & (column < S)[None, :]
    d_k_ptr = d_qkv_ptr + (clip * num_tokens + first_token + first_key) * ROW + D + head * S
    d_k_ptrs = d_k_ptr + tl.arange(0, BLOCK_K)[:, None] * ROW + column[None, :]
    tl.store(d_k_ptrs, d_k, mask=inside)
    tl.store(d_k_ptrs + D, d_v, mask=inside)
    if first_key + BLOCK_K > P:
        share_ptrs = cls_partial_ptr + ((clip * H + head) * T + frame) * 3 * S + column
        cls = (key == P)[:, None]
        tl.store(share_ptrs + S, tl.sum(tl.where(cls, d_k, 0.0), axis=0), mask=column < S)
        tl.store(share_ptrs + 2 * S, tl.sum(tl.where(cls, d_v, 0.0), axis=0), mask=column < S)


def _launch_parameters(table: dict, qkv_BN3HS: torch.Tensor, P: int) -> tuple[int, int, int, int, int | None]:
    S = qkv_BN3HS.shape[-1]
    if qkv_BN3HS.dtype == torch.float32:
        # No tensor cores: the operands of a product lie in registers, and tiles below 32 rows spill.
        return 32, 32, 8 if S > 64 else 4, 2, None
    measured = table.get((triton.next_power_of_2(P + 1), triton.next_power_of_2(S)))
    rows = max(16, min(64, triton.next_power_of_2(P + 1)))
    return measured or (rows, rows, 8 if S > 64 else 4, 2, None)


def _tail(P: int, block: int) -> int:
    # What a loop over blocks of patches leaves: the last patches and CLS. tl.dot wants 16 rows at least.
    return max(16, triton.next_power_of_2(P % block + 1))


def _attend_frames(qkv_BN3HS: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The public op has done this, but a compiler may choose strides of its own.
    qkv_BN3HS = qkv_BN3HS.contiguous()
    B, N, _, H, S = qkv_BN3HS.shape
    P = (N - 1) // T
    out_BND = torch.empty((B, N, H * S), dtype=qkv_BN3HS.dtype, device=qkv_BN3HS.device)
    lse_BHN = torch.empty((B, H, N), dtype=torch.float32, device=qkv_BN3HS.device)
    if out_BND.numel() == 0:
        return out_BND, lse_BHN
    cls_max_BHT, cls_sum_BHT = torch.empty((2, B, H, T), dtype=torch.float32, device=qkv_BN3HS.device)
    cls_value_BHTS = torch.empty((B, H, T, S), dtype=torch.float32, device=qkv_BN3HS.device)
    block_q, block_k, num_warps, stages, maxnreg = _launch_parameters(LAUNCH_FORWARD, qkv_BN3HS, P)
    with torch.cuda.device_of(qkv_BN3HS):
        _attend_kernel[(B * T * H * triton.cdiv(P + 1, block_q),)](
            qkv_BN3HS,
            out_BND,
            lse_BHN,
            cls_max_BHT,
            cls_sum_BHT,
            cls_value_BHTS,
            N,
            math.log2(math.e) / math.sqrt(S),
            P=P,
            H=H,
            S=S,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TAIL=_tail(P, block_k),
            BLOCK_S=max(16, triton.next_power_of_2(S)),
            STAGES=stages,
            num_warps=num_warps,
            maxnreg=maxnreg,
        )
        combine_cls_output(cls_max_BHT, cls_sum_BHT, cls_value_BHTS, out_BND, lse_BHN[:, :, 0])
    return out_BND, lse_BHN


def _differentiate_frames(
    d_out_BND, qkv_BN3HS, out_BND, lse_BHN, T: int, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    d_out_BND, qkv_BN3HS = d_out_BND.contiguous(), qkv_BN3HS.contiguous()
    B, N, _, H, S = qkv_BN3HS.shape
    P = (N - 1) // T
    d_qkv_BN3HS = torch.empty_like(qkv_BN3HS)
    if d_qkv_BN3HS.numel() == 0:
        return d_qkv_BN3HS, qkv_BN3HS.new_zeros(3 * H * S, dtype=torch.float32)
    row_starts_BHN2 = torch.empty((B, H, N, 2), dtype=torch.float32, device=qkv_BN3HS.device)
    cls_partial_BHT3S = torch.empty((B, H, T, 3, S), dtype=torch.float32, device=qkv_BN3HS.device)
    scales = math.log2(math.e) / math.sqrt(S), 1 / math.sqrt(S)
    sizes = {"P": P, "H": H, "S": S, "BLOCK_S": max(16, triton.next_power_of_2(S)), "WITH_BIAS": with_bias}

    def partial(block: int, parts: int) -> torch.Tensor:
        chunks = T * triton.cdiv(P + 1, block) if with_bias else 0
        return torch.empty((B, H, chunks, parts, S), dtype=torch.float32, device=qkv_BN3HS.device)

    with torch.cuda.device_of(qkv_BN3HS):
        block_q, block_k, num_warps, stages, maxnreg = _launch_parameters(LAUNCH_BACKWARD_QUERY, qkv_BN3HS, P)
        query_bias_BHC1S = partial(block_q, 1)
        _query_gradient_kernel[(B * T * H * triton.cdiv(P + 1, block_q),)](
            qkv_BN3HS,
            out_BND,
            d_out_BND,
            lse_BHN,
            row_starts_BHN2,
            d_qkv_BN3HS,
            cls_partial_BHT3S,
            query_bias_BHC1S,
            N,
            *scales,
            **sizes,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TAIL=_tail(P, block_k),
            STAGES=stages,
            num_warps=num_warps,
            maxnreg=maxnreg,
        )
        block_q, block_k, num_warps, stages, maxnreg = _launch_parameters(LAUNCH_BACKWARD_KEY, qkv_BN3HS, P)
        key_bias_BHC2S = partial(block_k, 2)
        _key_gradient_kernel[(B * T * H * triton.cdiv(P + 1, block_k),)](
            qkv_BN3HS,
            d_out_BND,
            row_starts_BHN2,
            d_qkv_BN3HS,
            cls_partial_BHT3S,
            key_bias_BHC2S,
            N,
            *scales,
            **sizes,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TAIL=_tail(P, block_q),
            STAGES=stages,
            num_warps=num_warps,
            maxnreg=maxnreg,
        )
        combine_cls_gradient(cls_partial_BHT3S, d_qkv_BN3HS)
    d_bias_H3S = torch.cat([share.sum((0, 2)) for share in (query_bias_BHC1S, key_bias_BHC2S)], dim=1)
    return d_qkv_BN3HS, d_bias_H3S.transpose(0, 1).flatten()


# Opaque custom ops rather than triton_op: `wrap_triton` refuses interpreted kernels, and there is nothing
# here for the compiler to fuse into.
@torch.library.custom_op(
    "miles_fast::space_attention",
    mutates_args=(),
    schema="(Tensor qkv_BN3HS, SymInt num_frames, Tensor? bias=None) -> (Tensor, Tensor)",
)
def _space_attention(qkv_BN3HS, num_frames, bias=None):
    return _attend_frames(qkv_BN3HS, num_frames)


@_space_attention.register_fake
def _(qkv_BN3HS, num_frames, bias=None):
    B, N, _, H, S = qkv_BN3HS.shape
    return qkv_BN3HS.new_empty((B, N, H * S)), qkv_BN3HS.new_empty((B, H, N), dtype=torch.float32)


@torch.library.custom_op(
    "miles_fast::space_attention_backward",
    mutates_args=(),
    schema="(Tensor d_out_BND, Tensor qkv_BN3HS, Tensor out_BND, Tensor lse_BHN, SymInt num_frames, "
    "bool with_bias) -> (Tensor, Tensor)",
)
def _space_attention_backward(d_out_BND, qkv_BN3HS, out_BND, lse_BHN, num_frames, with_bias):
    return _differentiate_frames(d_out_BND, qkv_BN3HS, out_BND, lse_BHN, num_frames, with_bias)


@_space_attention_backward.register_fake
def _(d_out_BND, qkv_BN3HS, out_BND, lse_BHN, num_frames, with_bias):
    _, _, _, H, S = qkv_BN3HS.shape
    return qkv_BN3HS.new_empty(qkv_BN3HS.shape), qkv_BN3HS.new_empty(3 * H * S, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    qkv_BN3HS, ctx.num_frames, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qkv_BN3HS, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out_BND, _d_lse):
    d_qkv_BN3HS, d_bias = _space_attention_backward(
        d_out_BND, *ctx.saved_tensors, ctx.num_frames, ctx.bias_dtype is not None
    )
    return d_qkv_BN3HS, None, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)


_space_attention.register_autograd(_backward, setup_context=_save_for_backward)


def space_attention(
    qkv_BN3HS: torch.Tensor, num_frames: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention within frames: (B, N, 3, H, S) to (B, N, H * S), with N = 1 + `num_frames` * P and gradient.

    `bias` (3 H S,) is one that qkv already holds without its history: it gets its gradient here.

    Triton for float32, bfloat16 and float16 on CUDA tensors (or under TRITON_INTERPRET=1), else the
    reference. A qkv that is not contiguous is copied once.

    Raises:
        ValueError: qkv is not a floating-point (B, N, 3, H, S), or N is not 1 + a multiple of the frames.
    """
    check_packed_qkv(qkv_BN3HS, num_frames)
    if runs_triton(qkv_BN3HS):
        return _space_attention(qkv_BN3HS.contiguous(), num_frames, bias)[0]
    return space_attention_reference(qkv_BN3HS, num_frames, bias)
