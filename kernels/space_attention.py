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

in two kernels (kernels/space_attention_kernels.py): programs of the first own queries (d_q, and delta for the
second), programs of the second own keys (d_k, d_v). Seven products instead of five, but no d_q passes between
programs. W and dX are rounded to the input's dtype for the products; everything else is float32. With
`query_bias`, which qkv already holds, those of the first also leave the sums of their d_q over rows: its
gradient in parts.

Letters beyond the README's: P positions per frame, H heads, S head width, F frames of all clips, C blocks of
queries.
"""

from __future__ import annotations

import math

import torch

from miles_fast.kernels.cls_row import combine_cls_gradient, combine_cls_output
from miles_fast.kernels.dispatch import runs_triton, triton
from miles_fast.kernels.divided_attention import (
    check_packed_qkv,
    divided_attention_reference,
    with_bias_history,
)
from miles_fast.kernels.space_attention_kernels import (
    attend_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)

# (P + 1, S), each rounded up to a power of two -> (query rows, key rows, warps per program, pipeline stages,
# most registers per thread or None), for 16-bit numbers; read at every call.
# Measured on an H100 at 256 frames of 196 patches and 12 heads, bf16, by `python benchmarks/micro.py --op
# space_attention --first --sweep` (benchmarks/results/h100-space-sweep.json): forward 0.178 ms. 64 rows on 4
# warps are one wgmma tile; what a frame's 197 rows leave, five, is a tile of 16.
LAUNCH_FORWARD = {(256, 64): (64, 32, 4, 4, None)}
LAUNCH_BACKWARD_QUERY = {(256, 64): (128, 32, 4, 3, None)}
LAUNCH_BACKWARD_KEY = {(256, 64): (32, 64, 4, 4, None)}


def space_attention_reference(
    qkv_BN3HS: torch.Tensor, num_frames: int, query_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """out (B, N, H S): the definition, in any dtype, differentiable by autograd."""
    return divided_attention_reference(with_bias_history(qkv_BN3HS, query_bias), num_frames, "space")


def _launch_parameters(table: dict, qkv_BN3HS: torch.Tensor, P: int) -> tuple[int, int, int, int, int | None]:
    S = qkv_BN3HS.shape[-1]
    if qkv_BN3HS.dtype == torch.float32:
        # No tensor cores: the operands of a product lie in registers, and tiles below 32 rows spill.
        return 32, 32, 8 if S > 64 else 4, 2, None
    measured = table.get((triton.next_power_of_2(P + 1), triton.next_power_of_2(S)))
    rows = max(16, min(64, triton.next_power_of_2(P + 1)))
    return measured or (rows, rows, 8 if S > 64 else 4, 2, None)


def _tail(P: int, block: int) -> int:
    # Rows for what full blocks of patches leave: the last patches and CLS. tl.dot wants 16 at least.
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
        attend_kernel[(B * T * H * triton.cdiv(P + 1, block_q),)](
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
            LAST_ROWS=_tail(P, block_q),
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
        return d_qkv_BN3HS, qkv_BN3HS.new_zeros(H * S, dtype=torch.float32)
    row_starts_BHN2 = torch.empty((B, H, N, 2), dtype=torch.float32, device=qkv_BN3HS.device)
    cls_partial_BHT3S = torch.empty((B, H, T, 3, S), dtype=torch.float32, device=qkv_BN3HS.device)
    scales = math.log2(math.e) / math.sqrt(S), 1 / math.sqrt(S)
    sizes = {"P": P, "H": H, "S": S, "BLOCK_S": max(16, triton.next_power_of_2(S))}

    with torch.cuda.device_of(qkv_BN3HS):
        block_q, block_k, num_warps, stages, maxnreg = _launch_parameters(LAUNCH_BACKWARD_QUERY, qkv_BN3HS, P)
        C = triton.cdiv(P + 1, block_q)
        bias_partial_FHCS = row_starts_BHN2.new_empty((B * T if with_bias else 0, H, C, S))
        query_gradient_kernel[(B * T * H * C,)](
            qkv_BN3HS,
            out_BND,
            d_out_BND,
            lse_BHN,
            row_starts_BHN2,
            d_qkv_BN3HS,
            cls_partial_BHT3S,
            bias_partial_FHCS,
            N,
            *scales,
            **sizes,
            WITH_BIAS=with_bias,
            BLOCK_Q=block_q,
            LAST_ROWS=_tail(P, block_q),
            BLOCK_K=block_k,
            TAIL=_tail(P, block_k),
            STAGES=stages,
            num_warps=num_warps,
            maxnreg=maxnreg,
        )
        block_q, block_k, num_warps, stages, maxnreg = _launch_parameters(LAUNCH_BACKWARD_KEY, qkv_BN3HS, P)
        key_gradient_kernel[(B * T * H * triton.cdiv(P + 1, block_k),)](
            qkv_BN3HS,
            d_out_BND,
            row_starts_BHN2,
            d_qkv_BN3HS,
            cls_partial_BHT3S,
            N,
            *scales,
            **sizes,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            LAST_ROWS=_tail(P, block_k),
            TAIL=_tail(P, block_q),
            STAGES=stages,
            num_warps=num_warps,
            maxnreg=maxnreg,
        )
        combine_cls_gradient(cls_partial_BHT3S, d_qkv_BN3HS)
    return d_qkv_BN3HS, bias_partial_FHCS.sum((0, 2)).flatten()


# Opaque custom ops rather than triton_op: `wrap_triton` refuses interpreted kernels, and there is nothing
# here for the compiler to fuse into.
@torch.library.custom_op(
    "miles_fast::space_attention",
    mutates_args=(),
    schema="(Tensor qkv_BN3HS, SymInt num_frames, Tensor? query_bias) -> (Tensor, Tensor)",
)
def _space_attention(qkv_BN3HS, num_frames, query_bias):
    return _attend_frames(qkv_BN3HS, num_frames)


@_space_attention.register_fake
def _(qkv_BN3HS, num_frames, query_bias):
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
    return qkv_BN3HS.new_empty(qkv_BN3HS.shape), qkv_BN3HS.new_empty(H * S, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    qkv_BN3HS, ctx.num_frames, query_bias = inputs
    ctx.bias_dtype = None if query_bias is None else query_bias.dtype
    ctx.save_for_backward(qkv_BN3HS, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out_BND, _d_lse):
    d_qkv_BN3HS, d_bias = _space_attention_backward(
        d_out_BND, *ctx.saved_tensors, ctx.num_frames, ctx.bias_dtype is not None
    )
    return d_qkv_BN3HS, None, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)


_space_attention.register_autograd(_backward, setup_context=_save_for_backward)


def space_attention(
    qkv_BN3HS: torch.Tensor, num_frames: int, query_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention within frames: (B, N, 3, H, S) to (B, N, H * S), with N = 1 + `num_frames` * P and gradient.

    `query_bias` (H S,) is one that the queries already hold without its history: it gets its gradient here.

    Triton for float32, bfloat16 and float16 on CUDA tensors (or under TRITON_INTERPRET=1), else the
    reference. A qkv that is not contiguous is copied once.

    Raises:
        ValueError: qkv is not a floating-point (B, N, 3, H, S), or N is not 1 + a multiple of the frames.
    """
    check_packed_qkv(qkv_BN3HS, num_frames)
    if runs_triton(qkv_BN3HS):
        return _space_attention(qkv_BN3HS.contiguous(), num_frames, query_bias)[0]
    return space_attention_reference(qkv_BN3HS, num_frames, query_bias)
