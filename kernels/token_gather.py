"""token_gather: the rows of some of a clip's tokens.

    out[b, m, :] = tokens[b, index[b, m], :]
    d_tokens[b, index[b, m], :] = d_out[b, m, :],  zero rows elsewhere

tokens (B, N, D), index (B, M) int64 or int32, out (B, M, D) in the dtype of the tokens. Tokens may be a view
with any clip and token stride (x[:, 1:]); rows of D contiguous numbers are read in place. Both directions
copy bits.

Indices of one clip are distinct: kept by training/masks.py. An index out of range raises on the CPU and gives
NaN rows on a GPU, where looking at it would make the host wait.

Gathering x[:, 1:] and gathering x with index + 1 read the same bytes, but autograd then copies the whole
gradient once more to undo the slice: prefer index + 1.
"""

from __future__ import annotations

import torch

from miles_fast.kernels.dispatch import jit, launch_parameters, runs_triton, tl, triton, with_unit_stride
from miles_fast.kernels.token_index import check_token_index, invert_token_index

# D rounded up to a power of two -> (rows per program, warps per program).
# Four warps hold one 1536-byte row in one 16-byte access a thread, so four rows put four independent loads in
# flight. At 1024 on an H100, `benchmarks/micro.py --op token_gather --sweep --first` finds nothing 1 %
# faster (benchmarks/results/h100-sweep.json); narrower rows were not swept.
LAUNCH_FORWARD = {1024: (4, 4), 512: (8, 4), 256: (16, 4), 128: (32, 4)}
LAUNCH_BACKWARD = {1024: (4, 4), 512: (8, 4), 256: (16, 4), 128: (32, 4)}


def token_gather_reference(tokens_BND: torch.Tensor, index_BM: torch.Tensor) -> torch.Tensor:
    """out (B, M, D): tokens[b, index[b, m]]. The definition, in any dtype, differentiable by autograd."""
    return tokens_BND.gather(1, index_BM.long().unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1]))


@jit
def _gather_rows_kernel(
    source_ptr,
    index_ptr,
    out_ptr,
    num_source_rows,
    num_out_rows,
    D,
    stride_clip,
    stride_row,
    MISSING_IS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Forward: source is the tokens, index their index. Backward: source is d_out, index the inverse (-1: a
    # zero row).
    pid = tl.program_id(0)
    blocks_per_clip = tl.cdiv(num_out_rows, ROWS)
    clip = (pid // blocks_per_clip).to(tl.int64)
    row = (pid % blocks_per_clip) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    stored = row < num_out_rows
    out_row = clip * num_out_rows + row
    source_row = tl.load(index_ptr + out_row, mask=stored, other=-1).to(tl.int64)
    present = (source_row >= 0) & (source_row < num_source_rows)
    inside = column < D
    missing = 0.0 if MISSING_IS_ZERO else float("nan")
    values = tl.load(
        source_ptr + clip * stride_clip + source_row[:, None] * stride_row + column[None, :],
        mask=present[:, None] & inside[None, :],
        other=missing,
    )
    tl.store(out_ptr + out_row[:, None] * D + column[None, :], values, mask=stored[:, None] & inside[None, :])


def _gather_rows(source: torch.Tensor, index: torch.Tensor, *, missing_is_zero: bool) -> torch.Tensor:
    source, index = with_unit_stride(source), index.contiguous()
    (B, num_out_rows), (_, num_source_rows, D) = index.shape, source.shape
    out = torch.empty((B, num_out_rows, D), dtype=source.dtype, device=source.device)
    if out.numel() == 0:
        return out
    rows, block_d, num_warps = launch_parameters(LAUNCH_BACKWARD if missing_is_zero else LAUNCH_FORWARD, D)
    with torch.cuda.device_of(source):
        _gather_rows_kernel[(B * triton.cdiv(num_out_rows, rows),)](
            source,
            index,
            out,
            num_source_rows,
            num_out_rows,
            D,
            source.stride(0),
            source.stride(1),
            MISSING_IS_ZERO=missing_is_zero,
            ROWS=rows,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return out


# Opaque custom ops rather than triton_op: `wrap_triton` refuses interpreted kernels, and there is nothing
# here for the compiler to fuse into.
@torch.library.custom_op(
    "miles_fast::token_gather", mutates_args=(), schema="(Tensor tokens_BND, Tensor index_BM) -> Tensor"
)
def _token_gather(tokens_BND, index_BM):
    return _gather_rows(tokens_BND, index_BM, missing_is_zero=False)


@_token_gather.register_fake
def _(tokens_BND, index_BM):
    return tokens_BND.new_empty((*index_BM.shape, tokens_BND.shape[-1]))


@torch.library.custom_op(
    "miles_fast::token_gather_backward",
    mutates_args=(),
    schema="(Tensor d_out_BMD, Tensor index_BM, SymInt num_tokens) -> Tensor",
)
def _token_gather_backward(d_out_BMD, index_BM, num_tokens):
    return _gather_rows(d_out_BMD, invert_token_index(index_BM, num_tokens), missing_is_zero=True)


@_token_gather_backward.register_fake
def _(d_out_BMD, index_BM, num_tokens):
    return d_out_BMD.new_empty((d_out_BMD.shape[0], num_tokens, d_out_BMD.shape[-1]))


def _save_for_backward(ctx, inputs, output):
    tokens_BND, index_BM = inputs
    ctx.save_for_backward(index_BM)
    ctx.num_tokens = tokens_BND.shape[1]


def _backward(ctx, d_out_BMD):
    (index_BM,) = ctx.saved_tensors
    return _token_gather_backward(d_out_BMD, index_BM, ctx.num_tokens), None


_token_gather.register_autograd(_backward, setup_context=_save_for_backward)


def token_gather(tokens_BND: torch.Tensor, index_BM: torch.Tensor) -> torch.Tensor:
    """Rows `index_BM` of every clip's tokens: (B, N, D) and (B, M) to (B, M, D), with gradient to the tokens.

    Triton for float32, bfloat16 and float16 on CUDA tensors (or under TRITON_INTERPRET=1), else the
    reference.

    Raises:
        ValueError: tokens are not a floating-point (B, N, D); the index is not int64 or int32 (B, M), is on
            another device, or (seen on the CPU only) names a token twice in one clip.
        IndexError: an index is out of range (seen on the CPU only; NaN rows on a GPU).
    """
    if tokens_BND.dim() != 3 or not tokens_BND.is_floating_point():
        raise ValueError(
            f"tokens_BND must be a floating-point (B, N, D), got {tokens_BND.dtype} {tuple(tokens_BND.shape)}"
        )
    check_token_index(index_BM, tokens_BND, "index_BM")
    if runs_triton(tokens_BND):
        return _token_gather(tokens_BND, index_BM)
    return token_gather_reference(tokens_BND, index_BM)
