"""The Triton kernels of kernels/space_attention.py: forward, the queries' and the keys' gradients."""

from __future__ import annotations

from miles_fast.kernels.dispatch import jit, product, tl


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
def _attend(q, k, v, allowed, row_max, row_sum, out, scale, MASKED: tl.constexpr):
    scores = product(q, tl.trans(k), None)
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, axis=1)
    out = product(weights.to(v.dtype), v, out * shrink[:, None])
    return new_max, row_sum, out


@jit
def attend_kernel(
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
    LAST_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    place = _place(num_tokens, P, H, BLOCK_Q)
    outs = out_ptr, lse_ptr, cls_max_ptr, cls_sum_ptr, cls_value_ptr
    numbers = num_tokens, scale
    if place[3] < P // BLOCK_Q * BLOCK_Q:
        _attend_rows(place, qkv_ptr, outs, numbers, P, H, S, BLOCK_Q, False, BLOCK_K, TAIL, BLOCK_S, STAGES)
    else:
        _attend_rows(place, qkv_ptr, outs, numbers, P, H, S, LAST_ROWS, True, BLOCK_K, TAIL, BLOCK_S, STAGES)


@jit
def _attend_rows(
    place,
    qkv_ptr,
    outs,
    numbers,
    P: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    # LAST: CLS is among the rows, and any behind it are none.
    clip, frame, head, first_query = place
    num_tokens, scale = numbers
    out_ptr, lse_ptr, cls_max_ptr, cls_sum_ptr, cls_value_ptr = outs
    D: tl.constexpr = H * S
    ROW: tl.constexpr = 3 * D
    FULL: tl.constexpr = P // BLOCK_K * BLOCK_K
    first_token, T = 1 + frame * P, (num_tokens - 1) // P
    q_ptr = qkv_ptr + clip * num_tokens * ROW + head * S
    k_ptr, v_ptr = q_ptr + D, q_ptr + 2 * D

    query, tail = first_query + tl.arange(0, BLOCK_Q), FULL + tl.arange(0, TAIL)
    query_token = tl.where(query < P, first_token + query, 0)
    tail_token = tl.where(tail < P, first_token + tail, 0)
    q = _rows(q_ptr, query_token, query <= P, LAST, ROW, S, BLOCK_S)
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
    if LAST:
        chunk = (clip * H + head) * T + frame
        tl.store(cls_max_ptr + chunk, tl.sum(tl.where(query == P, row_max, 0.0), axis=0))
        tl.store(cls_sum_ptr + chunk, tl.sum(tl.where(query == P, row_sum, 0.0), axis=0))
        value = tl.sum(tl.where((query == P)[:, None], out, 0.0), axis=0)
        tl.store(cls_value_ptr + chunk * S + column, value, mask=column < S)


@jit
def _query_gradient(q, k, v, d_out, lse, delta, allowed, d_q, scale, MASKED: tl.constexpr):
    weights = tl.exp2(product(q, tl.trans(k), None) * scale - lse[:, None])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    d_scores = weights * (product(d_out, tl.trans(v), None) - delta[:, None])
    return product(d_scores.to(k.dtype), k, d_q)


@jit
def query_gradient_kernel(
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
    LAST_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    place = _place(num_tokens, P, H, BLOCK_Q)
    bias_ptr = bias_partial_ptr + tl.program_id(0).to(tl.int64) * S
    ins, outs = (qkv_ptr, out_ptr, d_out_ptr, lse_ptr), (row_starts_ptr, d_qkv_ptr, cls_partial_ptr, bias_ptr)
    numbers = num_tokens, scale, d_scale
    if place[3] < P // BLOCK_Q * BLOCK_Q:
        _query_rows(
            place, ins, outs, numbers, P, H, S, BLOCK_Q, False, BLOCK_K, TAIL, BLOCK_S, STAGES, WITH_BIAS
        )
    else:
        _query_rows(
            place, ins, outs, numbers, P, H, S, LAST_ROWS, True, BLOCK_K, TAIL, BLOCK_S, STAGES, WITH_BIAS
        )


@jit
def _query_rows(
    place,
    ins,
    outs,
    numbers,
    P: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    clip, frame, head, first_query = place
    qkv_ptr, out_ptr, d_out_ptr, lse_ptr = ins
    row_starts_ptr, d_qkv_ptr, cls_partial_ptr, bias_ptr = outs
    num_tokens, scale, d_scale = numbers
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
    d_out = _rows(d_out_ptr + out_offset, query_token, query <= P, LAST, D, S, BLOCK_S)
    out = _rows(out_ptr + out_offset, query_token, query <= P, LAST, D, S, BLOCK_S)
    q = _rows(q_ptr, query_token, query <= P, LAST, ROW, S, BLOCK_S)
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
        tl.store(bias_ptr + column, tl.sum(d_q, axis=0), mask=column < S)
    d_q_ptr = d_qkv_ptr + (clip * num_tokens + first_token + first_query) * ROW + head * S
    d_q_ptrs = d_q_ptr + tl.arange(0, BLOCK_Q)[:, None] * ROW + column[None, :]
    tl.store(d_q_ptrs, d_q, mask=(query < P)[:, None] & (column < S)[None, :])
    if LAST:
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
    scores = product(k, tl.trans(q), tl.broadcast_to(start[None, :], tile))
    weights = tl.exp2(scores * scale)
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    d_v = product(weights.to(d_out.dtype), d_out, d_v)
    d_scores = weights * product(v, tl.trans(d_out), tl.broadcast_to(d_start[None, :], tile))
    d_k = product(d_scores.to(q.dtype), q, d_k)
    return d_k, d_v


@jit
def key_gradient_kernel(
    qkv_ptr,
    d_out_ptr,
    row_starts_ptr,
    d_qkv_ptr,
    cls_partial_ptr,
    num_tokens,
    scale,
    d_scale,
    P: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST_ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    place = _place(num_tokens, P, H, BLOCK_K)
    ins, outs = (qkv_ptr, d_out_ptr, row_starts_ptr), (d_qkv_ptr, cls_partial_ptr)
    numbers = num_tokens, scale, d_scale
    if place[3] < P // BLOCK_K * BLOCK_K:
        _key_rows(place, ins, outs, numbers, P, H, S, BLOCK_Q, BLOCK_K, False, TAIL, BLOCK_S, STAGES)
    else:
        _key_rows(place, ins, outs, numbers, P, H, S, BLOCK_Q, LAST_ROWS, True, TAIL, BLOCK_S, STAGES)


@jit
def _key_rows(
    place,
    ins,
    outs,
    numbers,
    P: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    clip, frame, head, first_key = place
    qkv_ptr, d_out_ptr, row_starts_ptr = ins
    d_qkv_ptr, cls_partial_ptr = outs
    num_tokens, scale, d_scale = numbers
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
    k = _rows(k_ptr, key_token, key <= P, LAST, ROW, S, BLOCK_S)
    v = _rows(v_ptr, key_token, key <= P, LAST, ROW, S, BLOCK_S)
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
    inside = (key < P)[:, None] & (column < S)[None, :]
    d_k_ptr = d_qkv_ptr + (clip * num_tokens + first_token + first_key) * ROW + D + head * S
    d_k_ptrs = d_k_ptr + tl.arange(0, BLOCK_K)[:, None] * ROW + column[None, :]
    tl.store(d_k_ptrs, d_k, mask=inside)
    tl.store(d_k_ptrs + D, d_v, mask=inside)
    if LAST:
        share_ptrs = cls_partial_ptr + ((clip * H + head) * T + frame) * 3 * S + column
        cls = (key == P)[:, None]
        tl.store(share_ptrs + S, tl.sum(tl.where(cls, d_k, 0.0), axis=0), mask=column < S)
        tl.store(share_ptrs + 2 * S, tl.sum(tl.where(cls, d_v, 0.0), axis=0), mask=column < S)
