"""temporal_attention: divided attention along time, straight from the packed qkv.

    out[b, n, h] = sum_j w_j v[b, j, h],   w = softmax_j(q[b, n, h] . k[b, j, h] / sqrt(S))

qkv (B, N, 3, H, S), N = 1 + T P, out (B, N, H S) in the same dtype. A patch query (frame t, position p) has
T + 1 keys: CLS and the patches (t', p) of all frames. The CLS query has all N. Backward is one packed d_qkv.
With P = w, d_P = d_out . v and delta = sum_j P_j d_P_j:

    d_v_j = sum_n P_nj d_out_n,   d_S = P (d_P - delta),   d_q = d_S k / sqrt(S),   d_k = d_S^T q / sqrt(S)

Bound by bandwidth, so that qkv is read once, out written once, and nothing is rearranged: a program takes the
T frames of some positions of one head, with the CLS token as one more row, and lets tensor cores multiply all
pairs of these rows. Most pairs are masked, but a masked product costs less than the shuffles of T + 1 dot
products per row. The CLS row is thereby the CLS query's share over these keys and the CLS key's share of
these gradients: float32 partial results, which kernels/cls_row.py adds up.

With `query_bias`, which qkv already holds, backward also gives its gradient, the sum of d_q over all rows,
while d_q is still in registers: float32 partial results per program.

Saved for backward: qkv, out (for its CLS row; the projection that follows keeps the same tensor) and the CLS
row's log-sum-exp. The other weights are computed again.

Letters beyond the README's: P positions per frame, H heads, S head width, C chunks of positions.
"""

from __future__ import annotations

import functools

import torch

from miles_fast.kernels.cls_row import combine_cls_gradient, combine_cls_output
from miles_fast.kernels.dispatch import jit, product, runs_triton, tl, triton
from miles_fast.kernels.divided_attention import (
    check_packed_qkv,
    divided_attention_reference,
    with_bias_history,
)

_MAX_FRAMES, _MAX_HEAD_WIDTH = 63, 128

# (T, S), each rounded up to a power of two -> (rows per program, warps per program). The rows are all frames
# of as many positions as fit, and CLS; shapes that are not named get (64, 4).
# Measured on an H100 at 64 clips of 4 x 196 patches and 12 heads, bf16, `python benchmarks/micro.py --op
# temporal_attention --sweep`: forward 0.116 ms, 88 % of its bytes' time; backward 0.224 ms, 80 %.
LAUNCH_FORWARD = {(1, 64): (64, 4), (4, 64): (64, 4), (16, 64): (32, 1)}
LAUNCH_BACKWARD = {(1, 64): (32, 1), (4, 64): (32, 4), (16, 64): (32, 4)}
# Without tensor cores (float32 is multiplied exactly) the masked pairs cost time, so that there are fewer.
_FLOAT32_ROWS = 32


def temporal_attention_reference(
    qkv_BN3HS: torch.Tensor, num_frames: int, query_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """out (B, N, H S): the definition, in any dtype, differentiable by autograd."""
    return divided_attention_reference(with_bias_history(qkv_BN3HS, query_bias), num_frames, "time")


@jit
def _row_tokens(chunk, num_tokens, T: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr):
    # Rows are (position, frame), then the CLS token, then rows without a token, which read CLS and are never
    # stored. A clip's offsets fit int32; clips are told apart in int64.
    row = tl.arange(0, ROWS)
    slot = row // T
    position = chunk * POSITIONS + slot
    num_positions = (num_tokens - 1) // T
    is_patch = (row < POSITIONS * T) & (position < num_positions)
    is_cls = row == POSITIONS * T
    token = tl.where(is_patch, 1 + (row % T) * num_positions + position, 0)
    return token, slot, is_patch, is_cls


@jit
def _attended_scores(q, k, slot, is_patch, is_cls, chunk):
    # -inf where a query does not see a key. The CLS query sees the CLS key in one chunk only; rows without a
    # token see themselves, so that no row is empty.
    scores = product(q, tl.trans(k), None)
    cls_sees = is_patch | (is_cls & (chunk == 0))
    patch_sees = (slot[:, None] == slot[None, :]) | is_cls[None, :]
    return tl.where(tl.where(is_cls[:, None], cls_sees[None, :], patch_sees), scores, float("-inf"))


@jit
def _attend_kernel(
    qkv_ptr,
    out_ptr,
    max_ptr,
    sum_ptr,
    values_ptr,
    num_tokens,
    num_chunks,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # Heads vary fastest: programs that run together read neighbouring memory.
    pid = tl.program_id(0)
    head, chunk = pid % H, (pid // H) % num_chunks
    clip = (pid // (H * num_chunks)).to(tl.int64)
    token, slot, is_patch, is_cls = _row_tokens(chunk, num_tokens, T, POSITIONS, ROWS)
    column = tl.arange(0, BLOCK_S)
    inside = (column < S)[None, :]

    q_ptr = qkv_ptr + (clip * num_tokens * (3 * H * S) + head * S)
    q_ptr += token[:, None] * (3 * H * S) + column[None, :]
    q = tl.load(q_ptr, mask=inside, other=0.0)
    k = tl.load(q_ptr + H * S, mask=inside, other=0.0)
    v = tl.load(q_ptr + 2 * H * S, mask=inside, other=0.0)

    scores = _attended_scores(q, k, slot, is_patch, is_cls, chunk)
    to_log2 = SCALE * 1.4426950408889634
    highest = tl.max(scores, axis=1) * to_log2
    weights = tl.exp2(scores * to_log2 - highest[:, None])
    total = tl.sum(weights, axis=1)
    out = product(weights.to(v.dtype), v, None)

    out_row = out_ptr + (clip * num_tokens * (H * S) + head * S)
    out_row += token[:, None] * (H * S) + column[None, :]
    tl.store(out_row, out * (1.0 / total)[:, None], mask=is_patch[:, None] & inside)
    share = (clip * H + head) * num_chunks + chunk
    every_row = tl.zeros([ROWS], tl.int64)
    tl.store(max_ptr + share + every_row, highest, mask=is_cls)
    tl.store(sum_ptr + share + every_row, total, mask=is_cls)
    tl.store(
        values_ptr + share * S + every_row[:, None] + column[None, :], out, mask=is_cls[:, None] & inside
    )


@jit
def _differentiate_kernel(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    d_out_ptr,
    d_qkv_ptr,
    partial_ptr,
    bias_partial_ptr,
    num_tokens,
    num_chunks,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    pid = tl.program_id(0)
    head, chunk = pid % H, (pid // H) % num_chunks
    clip = (pid // (H * num_chunks)).to(tl.int64)
    token, slot, is_patch, is_cls = _row_tokens(chunk, num_tokens, T, POSITIONS, ROWS)
    column = tl.arange(0, BLOCK_S)
    inside = (column < S)[None, :]

    qkv_start = clip * num_tokens * (3 * H * S) + head * S
    qkv_ptr += qkv_start
    d_qkv_ptr += qkv_start
    qkv_offset = token[:, None] * (3 * H * S) + column[None, :]
    q = tl.load(qkv_ptr + qkv_offset, mask=inside, other=0.0)
    k = tl.load(qkv_ptr + qkv_offset + H * S, mask=inside, other=0.0)
    v = tl.load(qkv_ptr + qkv_offset + 2 * H * S, mask=inside, other=0.0)
    # A row without a token gets no d_out and so adds nothing to any gradient.
    out_start = clip * num_tokens * (H * S) + head * S
    out_ptr += out_start
    d_out_ptr += out_start
    out_offset = token[:, None] * (H * S) + column[None, :]
    d_out = tl.load(d_out_ptr + out_offset, mask=(is_patch | is_cls)[:, None] & inside, other=0.0)
    # The CLS row's own sums run over all chunks, so that both come from the forward pass.
    cls_out = tl.load(out_ptr + column, mask=column < S, other=0.0).to(tl.float32)
    cls_d_out = tl.load(d_out_ptr + column, mask=column < S, other=0.0).to(tl.float32)
    cls_delta = tl.sum(cls_out * cls_d_out, axis=0)
    cls_lse = tl.load(lse_ptr + clip * H + head)

    scores = _attended_scores(q, k, slot, is_patch, is_cls, chunk)
    to_log2 = SCALE * 1.4426950408889634
    highest = tl.max(scores, axis=1) * to_log2
    weights = tl.exp2(scores * to_log2 - tl.where(is_cls, cls_lse, highest)[:, None])
    weights *= tl.where(is_cls, 1.0, 1.0 / tl.sum(weights, axis=1))[:, None]
    d_weights = product(d_out, tl.trans(v), None)
    delta = tl.where(is_cls, cls_delta, tl.sum(weights * d_weights, axis=1))
    d_scores = (weights * (d_weights - delta[:, None]) * SCALE).to(q.dtype)

    stored = is_patch[:, None] & inside
    share = ((clip * H + head) * num_chunks + chunk) * S
    partial = partial_ptr + 3 * share + tl.zeros([ROWS], tl.int64)[:, None] + column[None, :]
    is_partial = is_cls[:, None] & inside
    d_v = product(tl.trans(weights.to(q.dtype)), d_out, None)
    tl.store(d_qkv_ptr + qkv_offset + 2 * H * S, d_v, mask=stored)
    tl.store(partial + 2 * S, d_v, mask=is_partial)
    d_k = product(tl.trans(d_scores), q, None)
    tl.store(d_qkv_ptr + qkv_offset + H * S, d_k, mask=stored)
    tl.store(partial + S, d_k, mask=is_partial)
    d_q = product(d_scores, k, None)
    tl.store(d_qkv_ptr + qkv_offset, d_q, mask=stored)
    tl.store(partial, d_q, mask=is_partial)
    if WITH_BIAS:
        # Rows without a token have no gradient, so that whole columns are summed.
        tl.store(bias_partial_ptr + share + column, tl.sum(d_q, axis=0), mask=column < S)


def _launch_constants(table: dict, qkv_BN3HS: torch.Tensor, num_frames: int) -> tuple[int, dict]:
    """The number of chunks, and the constants of a kernel."""
    _, N, _, H, S = qkv_BN3HS.shape
    block_s = max(16, triton.next_power_of_2(S))
    rows, num_warps = table.get((triton.next_power_of_2(num_frames), block_s), (64, 4))
    if qkv_BN3HS.dtype == torch.float32:
        rows = _FLOAT32_ROWS
    return _divide_positions((N - 1) // num_frames, num_frames, H, S, block_s, rows, num_warps)


# Cached because a step asks 48 times for the same answer.
@functools.lru_cache
def _divide_positions(
    num_positions: int, T: int, H: int, S: int, block_s: int, rows: int, num_warps: int
) -> tuple[int, dict]:
    # Chunks of equal size, so that the last one is not nearly empty.
    num_chunks = triton.cdiv(num_positions, max(1, (rows - 1) // T))
    positions = triton.cdiv(num_positions, num_chunks)
    return num_chunks, {
        "SCALE": S**-0.5,
        "H": H,
        "S": S,
        "T": T,
        "POSITIONS": positions,
        "ROWS": max(16, triton.next_power_of_2(positions * T + 1)),
        "BLOCK_S": block_s,
        "num_warps": num_warps,
    }


# Opaque custom ops rather than triton_op: `wrap_triton` refuses interpreted kernels, and there is nothing
# here for the compiler to fuse into.
@torch.library.custom_op(
    "miles_fast::temporal_attention",
    mutates_args=(),
    schema="(Tensor qkv_BN3HS, int num_frames, Tensor? query_bias) -> (Tensor, Tensor)",
)
def _temporal_attention(qkv_BN3HS, num_frames, query_bias):
    qkv_BN3HS = qkv_BN3HS.contiguous()
    B, N, _, H, S = qkv_BN3HS.shape
    C, constants = _launch_constants(LAUNCH_FORWARD, qkv_BN3HS, num_frames)
    out_BND = qkv_BN3HS.new_empty((B, N, H * S))
    max_BHC = qkv_BN3HS.new_empty((B, H, C), dtype=torch.float32)
    sum_BHC = torch.empty_like(max_BHC)
    values_BHCS = qkv_BN3HS.new_empty((B, H, C, S), dtype=torch.float32)
    lse_BH = qkv_BN3HS.new_empty((B, H), dtype=torch.float32)
    with torch.cuda.device_of(qkv_BN3HS):
        _attend_kernel[(B * C * H,)](qkv_BN3HS, out_BND, max_BHC, sum_BHC, values_BHCS, N, C, **constants)
        combine_cls_output(max_BHC, sum_BHC, values_BHCS, out_BND, lse_BH)
    return out_BND, lse_BH


@_temporal_attention.register_fake
def _(qkv_BN3HS, num_frames, query_bias):
    B, N, _, H, S = qkv_BN3HS.shape
    return qkv_BN3HS.new_empty((B, N, H * S)), qkv_BN3HS.new_empty((B, H), dtype=torch.float32)


@torch.library.custom_op(
    "miles_fast::temporal_attention_backward",
    mutates_args=(),
    schema="(Tensor d_out_BND, Tensor qkv_BN3HS, Tensor out_BND, Tensor lse_BH, int num_frames, "
    "bool with_bias) -> (Tensor, Tensor)",
)
def _temporal_attention_backward(d_out_BND, qkv_BN3HS, out_BND, lse_BH, num_frames, with_bias):
    qkv_BN3HS, d_out_BND = qkv_BN3HS.contiguous(), d_out_BND.contiguous()
    B, N, _, H, S = qkv_BN3HS.shape
    C, constants = _launch_constants(LAUNCH_BACKWARD, qkv_BN3HS, num_frames)
    d_qkv_BN3HS = torch.empty_like(qkv_BN3HS)
    partial_BHC3S = qkv_BN3HS.new_empty((B, H, C, 3, S), dtype=torch.float32)
    bias_partial_BHCS = partial_BHC3S.new_empty((B if with_bias else 0, H, C, S))
    with torch.cuda.device_of(qkv_BN3HS):
        _differentiate_kernel[(B * C * H,)](
            qkv_BN3HS,
            out_BND,
            lse_BH,
            d_out_BND,
            d_qkv_BN3HS,
            partial_BHC3S,
            bias_partial_BHCS,
            N,
            C,
            WITH_BIAS=with_bias,
            **constants,
        )
        combine_cls_gradient(partial_BHC3S, d_qkv_BN3HS)
    return d_qkv_BN3HS, bias_partial_BHCS.sum((0, 2)).flatten()


@_temporal_attention_backward.register_fake
def _(d_out_BND, qkv_BN3HS, out_BND, lse_BH, num_frames, with_bias):
    _, _, _, H, S = qkv_BN3HS.shape
    return qkv_BN3HS.new_empty(qkv_BN3HS.shape), qkv_BN3HS.new_empty(H * S, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    qkv_BN3HS, ctx.num_frames, query_bias = inputs
    ctx.bias_dtype = None if query_bias is None else query_bias.dtype
    ctx.save_for_backward(qkv_BN3HS, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out_BND, _d_lse):
    d_qkv_BN3HS, d_bias = _temporal_attention_backward(
        d_out_BND, *ctx.saved_tensors, ctx.num_frames, ctx.bias_dtype is not None
    )
    return d_qkv_BN3HS, None, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)


_temporal_attention.register_autograd(_backward, setup_context=_save_for_backward)


def temporal_attention(
    qkv_BN3HS: torch.Tensor, num_frames: int, query_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Divided attention along time: packed qkv (B, 1 + T P, 3, H, S) to (B, 1 + T P, H * S), with gradient.

    `query_bias` (H S,) is one that the queries already hold without its history: it gets its gradient here.

    Triton for float32, bfloat16 and float16 on CUDA tensors (or under TRITON_INTERPRET=1) up to 63 frames and
    heads of 128, else the reference. A qkv that is not contiguous is copied once.

    Raises:
        ValueError: qkv is not a floating-point (B, N, 3, H, S), or N is not 1 + a multiple of `num_frames`.
    """
    check_packed_qkv(qkv_BN3HS, num_frames)
    if (
        runs_triton(qkv_BN3HS)
        and num_frames <= _MAX_FRAMES
        and qkv_BN3HS.shape[-1] <= _MAX_HEAD_WIDTH
        and qkv_BN3HS.numel() > 0
    ):
        return _temporal_attention(qkv_BN3HS, num_frames, query_bias)[0]
    return temporal_attention_reference(qkv_BN3HS, num_frames, query_bias)
