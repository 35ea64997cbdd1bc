"""feature_regression: the masked visual modelling loss, student features against the snapshot's.

    p = prediction[b, prediction_index[b, m]]    t = stop_gradient(target[b, target_index[b, m]])
    loss = mean over b, m of distance(u, v),     u = norm(p), v = norm(t)

    normalization   norm(x)                                       distance
    'l2'            x / max(|x|, 1e-8)                            sum_D (u - v)^2   = 2 - 2 cos(p, t)
    'layernorm'     (x - mean x) / sqrt(var x + 1e-6), no affine  mean_D (u - v)^2
    'none'          x                                             mean_D (u - v)^2

prediction (B, N, D), target (B, N', D), indices (B, M) int64 or int32, loss a float32 scalar; without an
index the rows are taken in order and there must be M of them.
Inputs may be float32, bfloat16 or float16, each its own; arithmetic is float32. Views with any clip and token
stride (x[:, 1:]) are read in place. The spec's form of the loss (miles.md 2.2) is inferred, not the paper's:
state which one a result used.

With u = (p - shift) * scale the gradient of every form is one formula, w = 1 ('l2') or 1/D:

    dp = (d_loss / rows) * 2 w * scale_p * ((u - v) - s u),     s = w * sum_D u (u - v)

('none', and 'l2' below its floor, have a constant scale, hence s = 0). The forward pass saves shift and scale
of both rows and s: 20 bytes a row, and backward is one pass more with no normalised copy in memory. (u - v)
is formed before it is squared: 2 - 2 cos loses every digit as the student nears its target.

Indices of one clip are distinct within `prediction_index_BM`: kept by training/masks.py. An index out of
range raises on the CPU and makes the loss NaN on a GPU, where looking at it would make the host wait. Prefer
index + 1 to indexing a slice x[:, 1:] of the prediction: autograd would copy the whole gradient once more to
undo the slice.
"""

from __future__ import annotations

import torch

from miles_fast.kernels.dispatch import jit, launch_parameters, runs_triton, tl, triton, with_unit_stride
from miles_fast.kernels.token_index import check_token_index, invert_token_index

NORMALIZATIONS = ("l2", "layernorm", "none")
_L2_FLOOR = 1e-8
_LAYERNORM_EPS = 1e-6

# D rounded up to a power of two -> (rows per program, warps per program).
# A row in one warp is reduced by shuffles alone, and both rows of 768 numbers take 48 registers a thread in
# float32. At 1024 on an H100, `benchmarks/micro.py --op feature_regression --sweep --first` finds nothing 2 %
# faster (benchmarks/results/h100-sweep.json); narrower rows were not swept.
LAUNCH_FORWARD = {1024: (1, 1), 512: (2, 1), 256: (4, 1), 128: (8, 1)}
LAUNCH_BACKWARD = {1024: (2, 4), 512: (4, 4), 256: (8, 4), 128: (16, 4)}


def feature_regression_reference(
    prediction_BMD: torch.Tensor,
    target: torch.Tensor,
    *,
    target_index_BM: torch.Tensor | None = None,
    prediction_index_BM: torch.Tensor | None = None,
    normalization: str = "l2",
) -> torch.Tensor:
    """The loss as a scalar: the definition, in float64 where an input is float64, else in float32."""
    wide = torch.float64 if torch.float64 in (prediction_BMD.dtype, target.dtype) else torch.float32

    def rows(tokens_BND, index_BM):
        if index_BM is None:
            return tokens_BND.to(wide)
        index_BMD = index_BM.long().unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1])
        return tokens_BND.gather(1, index_BMD).to(wide)

    def norm(x):
        if normalization == "l2":
            return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_L2_FLOOR)
        if normalization == "layernorm":
            return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=_LAYERNORM_EPS)
        return x

    u = norm(rows(prediction_BMD, prediction_index_BM))
    v = norm(rows(target.detach(), target_index_BM))
    squared = (u - v).square()
    return (squared.sum(-1) if normalization == "l2" else squared.mean(-1)).mean()


@jit
def _layernorm_shift_and_scale(x, inside, D, EPS: tl.constexpr):
    shift = tl.sum(x, axis=1) / D
    centered = tl.where(inside[None, :], x - shift[:, None], 0.0)
    return shift, 1.0 / tl.sqrt_rn(tl.sum(centered * centered, axis=1) / D + EPS)


@jit
def _compare_rows_kernel(
    prediction_ptr,
    target_ptr,
    prediction_index_ptr,
    target_index_ptr,
    row_loss_ptr,
    row_state_ptr,
    M,
    num_predictions,
    num_targets,
    D,
    prediction_stride_clip,
    prediction_stride_row,
    target_stride_clip,
    target_stride_row,
    NORMALIZATION: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_per_clip = tl.cdiv(M, ROWS)
    clip = (pid // blocks_per_clip).to(tl.int64)
    m = (pid % blocks_per_clip) * ROWS + tl.arange(0, ROWS)
    valid = m < M
    row = clip * M + m
    prediction_row = m.to(tl.int64)
    if prediction_index_ptr is not None:
        prediction_row = tl.load(prediction_index_ptr + row, mask=valid, other=0).to(tl.int64)
    target_row = m.to(tl.int64)
    if target_index_ptr is not None:
        target_row = tl.load(target_index_ptr + row, mask=valid, other=0).to(tl.int64)
    in_range = (prediction_row >= 0) & (prediction_row < num_predictions)
    in_range = in_range & (target_row >= 0) & (target_row < num_targets)

    column = tl.arange(0, BLOCK_D)
    inside = column < D
    read = (valid & in_range)[:, None] & inside[None, :]
    prediction_offset = clip * prediction_stride_clip + prediction_row[:, None] * prediction_stride_row
    target_offset = clip * target_stride_clip + target_row[:, None] * target_stride_row
    p = tl.load(prediction_ptr + prediction_offset + column[None, :], mask=read, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + target_offset + column[None, :], mask=read, other=0.0).to(tl.float32)

    shift_p = tl.zeros([ROWS], tl.float32)
    scale_p = tl.full([ROWS], 1.0, tl.float32)
    shift_t, scale_t = shift_p, scale_p
    if NORMALIZATION == "l2":
        length_p = tl.sqrt_rn(tl.sum(p * p, axis=1))
        length_t = tl.sqrt_rn(tl.sum(t * t, axis=1))
        scale_p = 1.0 / tl.maximum(length_p, EPS)
        scale_t = 1.0 / tl.maximum(length_t, EPS)
    if NORMALIZATION == "layernorm":
        shift_p, scale_p = _layernorm_shift_and_scale(p, inside, D, EPS)
        shift_t, scale_t = _layernorm_shift_and_scale(t, inside, D, EPS)
    # A scale of NaN carries an index out of range into the loss and into its row's gradient.
    scale_p = tl.where(in_range, scale_p, float("nan"))

    u = (p - shift_p[:, None]) * scale_p[:, None]
    difference = tl.where(inside[None, :], u - (t - shift_t[:, None]) * scale_t[:, None], 0.0)
    loss = tl.sum(difference * difference, axis=1)
    s = tl.zeros([ROWS], tl.float32)
    if NORMALIZATION == "l2":
        # Below the floor the length is a constant, so that its share of the gradient falls away.
        s = tl.where(length_p >= EPS, tl.sum(u * difference, axis=1), s)
    if NORMALIZATION == "layernorm":
        s = tl.sum(u * difference, axis=1) / D
    if NORMALIZATION != "l2":
        loss = loss / D
    tl.store(row_loss_ptr + row, loss, mask=valid)
    tl.store(row_state_ptr + row * 5, shift_p, mask=valid)
    tl.store(row_state_ptr + row * 5 + 1, scale_p, mask=valid)
    tl.store(row_state_ptr + row * 5 + 2, shift_t, mask=valid)
    tl.store(row_state_ptr + row * 5 + 3, scale_t, mask=valid)
    tl.store(row_state_ptr + row * 5 + 4, s, mask=valid)


@jit
def _differentiate_rows_kernel(
    prediction_ptr,
    target_ptr,
    inverse_ptr,
    target_index_ptr,
    row_state_ptr,
    d_row_loss_ptr,
    d_prediction_ptr,
    M,
    num_predictions,
    num_targets,
    D,
    prediction_stride_clip,
    prediction_stride_row,
    target_stride_clip,
    target_stride_row,
    d_row_loss_stride_clip,
    d_row_loss_stride_row,
    weight,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program covers rows of the prediction, not of the index: rows that no m names are written here, as
    # zeros.
    pid = tl.program_id(0)
    blocks_per_clip = tl.cdiv(num_predictions, ROWS)
    clip = (pid // blocks_per_clip).to(tl.int64)
    n = ((pid % blocks_per_clip) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = n < num_predictions
    m = n
    if inverse_ptr is not None:
        m = tl.load(inverse_ptr + clip * num_predictions + n, mask=valid, other=-1).to(tl.int64)
    named = valid & (m >= 0)
    row = clip * M + m
    target_row = m
    if target_index_ptr is not None:
        target_row = tl.load(target_index_ptr + row, mask=named, other=0).to(tl.int64)
    in_range = (target_row >= 0) & (target_row < num_targets)

    shift_p = tl.load(row_state_ptr + row * 5, mask=named, other=0.0)
    scale_p = tl.load(row_state_ptr + row * 5 + 1, mask=named, other=0.0)
    shift_t = tl.load(row_state_ptr + row * 5 + 2, mask=named, other=0.0)
    scale_t = tl.load(row_state_ptr + row * 5 + 3, mask=named, other=0.0)
    s = tl.load(row_state_ptr + row * 5 + 4, mask=named, other=0.0)
    d_row_loss_offset = clip * d_row_loss_stride_clip + m * d_row_loss_stride_row
    d_row_loss = tl.load(d_row_loss_ptr + d_row_loss_offset, mask=named, other=0.0)

    column = tl.arange(0, BLOCK_D)
    inside = column < D
    read = (named & in_range)[:, None] & inside[None, :]
    prediction_offset = clip * prediction_stride_clip + n[:, None] * prediction_stride_row
    target_offset = clip * target_stride_clip + target_row[:, None] * target_stride_row
    p = tl.load(prediction_ptr + prediction_offset + column[None, :], mask=read, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + target_offset + column[None, :], mask=read, other=0.0).to(tl.float32)

    u = (p - shift_p[:, None]) * scale_p[:, None]
    difference = u - (t - shift_t[:, None]) * scale_t[:, None]
    d_p = (d_row_loss * scale_p * weight)[:, None] * (difference - s[:, None] * u)
    out_row = clip * num_predictions + n
    tl.store(
        d_prediction_ptr + out_row[:, None] * D + column[None, :], d_p, mask=valid[:, None] & inside[None, :]
    )


def _num_rows(prediction: torch.Tensor, prediction_index: torch.Tensor | None) -> int:
    return prediction.shape[1] if prediction_index is None else prediction_index.shape[1]


# The op returns the loss of every row and leaves their mean to PyTorch: deterministic, without atomics, and
# the mean's gradient arrives as one number with strides (0, 0), which the backward kernel reads as such.
@torch.library.custom_op(
    "miles_fast::feature_regression",
    mutates_args=(),
    schema="(Tensor prediction, Tensor target, Tensor? prediction_index_BM, Tensor? target_index_BM,"
    " str normalization) -> (Tensor, Tensor)",
)
def _feature_regression(prediction, target, prediction_index_BM, target_index_BM, normalization):
    prediction, target = with_unit_stride(prediction), with_unit_stride(target)
    B, num_predictions, D = prediction.shape
    M = _num_rows(prediction, prediction_index_BM)
    row_loss_BM = torch.empty((B, M), dtype=torch.float32, device=prediction.device)
    row_state_BM5 = torch.empty((B, M, 5), dtype=torch.float32, device=prediction.device)
    rows, block_d, num_warps = launch_parameters(LAUNCH_FORWARD, D)
    with torch.cuda.device_of(prediction):
        _compare_rows_kernel[(B * triton.cdiv(M, rows),)](
            prediction,
            target,
            None if prediction_index_BM is None else prediction_index_BM.contiguous(),
            None if target_index_BM is None else target_index_BM.contiguous(),
            row_loss_BM,
            row_state_BM5,
            M,
            num_predictions,
            target.shape[1],
            D,
            *prediction.stride()[:2],
            *target.stride()[:2],
            NORMALIZATION=normalization,
            EPS=_L2_FLOOR if normalization == "l2" else _LAYERNORM_EPS,
            ROWS=rows,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return row_loss_BM, row_state_BM5


@_feature_regression.register_fake
def _(prediction, target, prediction_index_BM, target_index_BM, normalization):
    B, M = prediction.shape[0], _num_rows(prediction, prediction_index_BM)
    row_loss_BM = prediction.new_empty((B, M), dtype=torch.float32)
    return row_loss_BM, prediction.new_empty((B, M, 5), dtype=torch.float32)


@torch.library.custom_op(
    "miles_fast::feature_regression_backward",
    mutates_args=(),
    schema="(Tensor d_row_loss_BM, Tensor prediction, Tensor target, Tensor row_state_BM5,"
    " Tensor? prediction_index_BM, Tensor? target_index_BM, str normalization) -> Tensor",
)
def _feature_regression_backward(
    d_row_loss_BM, prediction, target, row_state_BM5, prediction_index_BM, target_index_BM, normalization
):
    prediction, target = with_unit_stride(prediction), with_unit_stride(target)
    B, num_predictions, D = prediction.shape
    M = d_row_loss_BM.shape[1]
    inverse_BN = None
    if prediction_index_BM is not None:
        inverse_BN = invert_token_index(prediction_index_BM, num_predictions)
    d_prediction = torch.empty((B, num_predictions, D), dtype=prediction.dtype, device=prediction.device)
    rows, block_d, num_warps = launch_parameters(LAUNCH_BACKWARD, D)
    with torch.cuda.device_of(prediction):
        _differentiate_rows_kernel[(B * triton.cdiv(num_predictions, rows),)](
            prediction,
            target,
            inverse_BN,
            None if target_index_BM is None else target_index_BM.contiguous(),
            row_state_BM5,
            d_row_loss_BM,
            d_prediction,
            M,
            num_predictions,
            target.shape[1],
            D,
            *prediction.stride()[:2],
            *target.stride()[:2],
            *d_row_loss_BM.stride(),
            2.0 if normalization == "l2" else 2.0 / D,
            ROWS=rows,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return d_prediction


@_feature_regression_backward.register_fake
def _(d_row_loss_BM, prediction, target, row_state_BM5, prediction_index_BM, target_index_BM, normalization):
    return prediction.new_empty(prediction.shape)


def _save_for_backward(ctx, inputs, output):
    prediction, target, prediction_index_BM, target_index_BM, ctx.normalization = inputs
    ctx.save_for_backward(prediction, target, output[1], prediction_index_BM, target_index_BM)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_row_loss_BM, _d_row_state):
    d_prediction = _feature_regression_backward(d_row_loss_BM, *ctx.saved_tensors, ctx.normalization)
    return d_prediction, None, None, None, None


_feature_regression.register_autograd(_backward, setup_context=_save_for_backward)


def feature_regression(
    prediction_BMD: torch.Tensor,
    target: torch.Tensor,
    *,
    target_index_BM: torch.Tensor | None = None,
    prediction_index_BM: torch.Tensor | None = None,
    normalization: str = "l2",
) -> torch.Tensor:
    """Mean distance between the masked rows of a prediction and of a target, as a float32 scalar.

    Gradient goes to the prediction only (zero rows where `prediction_index_BM` names none); the target is
    detached even if it asks for one. Without an index a tensor's rows are taken in order, and it must then
    have exactly M. Triton for float32, bfloat16 and float16 on CUDA tensors (or under TRITON_INTERPRET=1),
    else the reference.

    Raises:
        ValueError: unknown normalization; prediction or target not a floating-point (B, rows, D); B, D or M
            differ; no rows at all; another device; an index not int64 or int32 (B, M), or (seen on the CPU
            only) naming a prediction twice in one clip.
        IndexError: an index is out of range (seen on the CPU only; the loss is NaN on a GPU).
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r}: choose one of {', '.join(NORMALIZATIONS)}")
    for name, tensor in (("prediction_BMD", prediction_BMD), ("target", target)):
        if tensor.dim() != 3 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point (B, rows, D), got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if prediction_BMD.device != target.device:
        raise ValueError(f"prediction_BMD is on {prediction_BMD.device}, target on {target.device}")
    (B, _, D), target_shape = prediction_BMD.shape, tuple(target.shape)
    if (B, D) != (target_shape[0], target_shape[2]):
        raise ValueError(
            f"clips or widths differ: prediction_BMD {tuple(prediction_BMD.shape)}, target {target_shape}"
        )
    if prediction_index_BM is not None:
        check_token_index(prediction_index_BM, prediction_BMD, "prediction_index_BM")
    if target_index_BM is not None:
        check_token_index(target_index_BM, target, "target_index_BM", distinct=False)
    M, target_M = _num_rows(prediction_BMD, prediction_index_BM), _num_rows(target, target_index_BM)
    if M != target_M:
        raise ValueError(
            f"{M} prediction rows a clip against {target_M} target rows: pass the index of the longer one"
        )
    if B * M * D == 0:
        raise ValueError(f"no rows to compare: B={B}, M={M}, D={D} (the mean over none is NaN)")
    if not runs_triton(prediction_BMD, target):
        return feature_regression_reference(
            prediction_BMD,
            target,
            target_index_BM=target_index_BM,
            prediction_index_BM=prediction_index_BM,
            normalization=normalization,
        )
    row_loss_BM, _ = _feature_regression(
        prediction_BMD, target.detach(), prediction_index_BM, target_index_BM, normalization
    )
    return row_loss_BM.mean()
