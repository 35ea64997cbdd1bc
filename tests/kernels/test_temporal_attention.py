import math

import pytest
import torch

from miles_fast.kernels import attention_cases, cases, temporal_attention
from miles_fast.kernels.attention_cases import AttentionCase
from miles_fast.kernels.cls_row import combine_cls_gradient, combine_cls_output
from miles_fast.kernels.dispatch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP, REFERENCE = temporal_attention.temporal_attention, temporal_attention.temporal_attention_reference
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs Triton or its interpreter"
)


def _qkv(B=2, N=9, H=2, S=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, N, 3, H, S, generator=generator).to(DEVICE, dtype).requires_grad_()


def _packed(*tokens):
    """One clip of one head of width 1 from (q, k, v) of every token."""
    return torch.tensor(tokens, device=DEVICE).view(1, -1, 3, 1, 1).requires_grad_()


@pytest.mark.parametrize("case", attention_cases.SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, OP, REFERENCE, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", attention_cases.TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case):
    assert cases.violations(case, OP, REFERENCE, "cuda") == []


@needs_triton
@pytest.mark.parametrize("rows", (16, 32, 128))
def test_keeps_the_error_rule_whatever_the_launch_table_says(rows, monkeypatch):
    for table in (temporal_attention.LAUNCH_FORWARD, temporal_attention.LAUNCH_BACKWARD):
        monkeypatch.setitem(table, (4, 16), (rows, 4))
    # 16 rows: seven chunks of 3 positions, the last with 1.
    case = AttentionCase(B=1, T=4, P=19, H=2, S=16, dtype=torch.float16)
    assert cases.violations(case, OP, REFERENCE, DEVICE) == []


@pytest.mark.parametrize("op", (OP, REFERENCE))
def test_values_and_gradient_by_hand_of_equal_weights(op):
    # T = 2, P = 2: queries and keys are 0, so that every query averages the values it sees.
    qkv = _packed(*((0.0, 0.0, value) for value in (3.0, 6.0, 30.0, 12.0, 60.0)))
    out = op(qkv, 2)
    torch.testing.assert_close(out.flatten().tolist(), [22.2, 7.0, 31.0, 7.0, 31.0])
    (d_qkv,) = torch.autograd.grad(out.sum(), qkv)
    assert not d_qkv[:, :, :2].any()
    torch.testing.assert_close(d_qkv[0, :, 2].flatten().tolist(), [1 / 5 + 4 / 3] + [1 / 5 + 2 / 3] * 4)


@pytest.mark.parametrize("op", (OP, REFERENCE))
def test_values_and_gradient_by_hand_of_one_patch(op):
    # The patch weighs CLS 3 : 1 against itself, the CLS query 1 : 1.
    log3 = math.log(3.0)
    qkv = _packed((0.0, log3, 4.0), (1.0, 0.0, 8.0))
    out = op(qkv, 1)
    torch.testing.assert_close(out.flatten().tolist(), [6.0, 5.0])
    (d_qkv,) = torch.autograd.grad(out, qkv, torch.tensor([[[0.0], [1.0]]], device=DEVICE))
    expected = [0.0, -0.75, 0.75, -0.75 * log3, 0.75, 0.25]
    torch.testing.assert_close(d_qkv.flatten().tolist(), expected)


def test_copies_a_strided_qkv_and_a_strided_gradient():
    channels_first = torch.randn(2, 3, 2, 4, 9, device=DEVICE, requires_grad=True)
    strided = channels_first.permute(0, 4, 1, 2, 3)
    weight = torch.randn(8, device=DEVICE)
    results = []
    for op in (OP, REFERENCE):
        out = op(strided, 2)
        (gradient,) = torch.autograd.grad((out.transpose(1, 2).sum(2) * weight).sum(), channels_first)
        results.append((out, gradient))
    torch.testing.assert_close(*results)


def test_gives_the_same_bits_twice():
    qkv = _qkv(N=41)
    first, second = (OP(qkv, 2) for _ in range(2))
    (d_first,), (d_second,) = (torch.autograd.grad(out.square().sum(), qkv) for out in (first, second))
    assert torch.equal(first, second) and torch.equal(d_first, d_second)


@pytest.mark.parametrize(("num_frames", "S"), ((20, 8), (64, 8), (2, 130)))
def test_answers_long_clips_and_wide_heads(num_frames, S):
    qkv = _qkv(B=1, N=1 + 2 * num_frames, H=1, S=S)
    torch.testing.assert_close(OP(qkv, num_frames), REFERENCE(qkv, num_frames))


def test_answers_no_clips():
    qkv = torch.zeros(0, 5, 3, 2, 4, device=DEVICE)
    assert OP(qkv, 2).shape == (0, 5, 8)


def test_float64_is_answered_by_the_reference_and_passes_gradcheck():
    qkv = _qkv(B=1, N=5, H=1, S=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: OP(x, 2), qkv.detach().requires_grad_())


@needs_triton
def test_cls_row_combines_more_chunks_than_one_load_holds():
    B, H, C, S, N = 2, 3, 21, 12, 4
    scores, values = torch.randn(B, H, C, 5, device=DEVICE), torch.randn(B, H, C, 5, S, device=DEVICE)
    highest = scores.amax(-1)
    weights = torch.exp2(scores - highest[..., None])
    out = torch.zeros(B, N, H * S, device=DEVICE)
    lse = torch.empty(B, H, device=DEVICE)
    combine_cls_output(highest, weights.sum(-1), (weights[..., None] * values).sum(-2), out, lse)
    torch.testing.assert_close(lse, torch.logsumexp(scores.flatten(2) * math.log(2), -1) / math.log(2))
    softmax = (scores.flatten(2) * math.log(2)).softmax(-1)
    expected = (softmax[:, :, None] @ values.flatten(2, 3)).flatten(1)
    torch.testing.assert_close(out[:, 0], expected)
    assert not out[:, 1:].any()

    partial, d_qkv = torch.randn(B, H, C, 3, S, device=DEVICE), torch.zeros(B, N, 3, H, S, device=DEVICE)
    combine_cls_gradient(partial, d_qkv)
    torch.testing.assert_close(d_qkv[:, 0], partial.sum(2).transpose(1, 2))
    assert not d_qkv[:, 1:].any()


@needs_triton
def test_registered_op_is_sound():
    torch.library.opcheck(torch.ops.miles_fast.temporal_attention.default, (_qkv(), 2, None))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_traces_as_one_graph(backend, dtype):
    qkv = _qkv(dtype=dtype).detach().flatten(2).requires_grad_()

    def square_of_attention(qkv_BND):
        return OP((qkv_BND * 2).unflatten(2, (3, 2, 4)), 4).square().sum()

    compiled = torch.compile(square_of_attention, backend=backend, fullgraph=True)
    (found,) = torch.autograd.grad(compiled(qkv), qkv)
    (expected,) = torch.autograd.grad(square_of_attention(qkv), qkv)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "num_frames", "message"),
    (
        ((2, 5, 24), torch.float32, 2, r"\(B, N, 3, H, S\)"),
        ((2, 5, 2, 2, 4), torch.float32, 2, r"\(B, N, 3, H, S\)"),
        ((2, 5, 3, 2, 4), torch.int32, 2, "floating-point"),
        ((2, 5, 3, 2, 4), torch.float32, 3, "5 tokens are not 1 \\+ a multiple of 3 frames"),
        ((2, 5, 3, 2, 4), torch.float32, 0, "multiple of 0 frames"),
        ((2, 1, 3, 2, 4), torch.float32, 1, "1 tokens"),
    ),
)
def test_says_what_is_wrong_with_its_inputs(shape, dtype, num_frames, message):
    with pytest.raises(ValueError, match=message):
        OP(torch.zeros(shape, dtype=dtype), num_frames)
