import math

import pytest
import torch

from miles_fast.kernels import attention_cases, cases, cls_row
from miles_fast.kernels import space_attention as module
from miles_fast.kernels.dispatch import INTERPRETED
from miles_fast.kernels.space_attention import space_attention, space_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _qkv(B=1, N=5, H=1, S=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, N, 3, H, S, generator=generator).to(DEVICE, dtype)


def _close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, device=DEVICE))


@pytest.mark.parametrize("case", attention_cases.SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, space_attention, space_attention_reference, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", attention_cases.TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case):
    assert cases.violations(case, space_attention, space_attention_reference, "cuda") == []


@pytest.mark.parametrize(("block_q", "block_k"), ((16, 16), (16, 32), (32, 16)))
@pytest.mark.parametrize("P", (32, 38))
def test_any_tile_of_the_launch_tables_keeps_the_error_rule(block_q, block_k, P, monkeypatch):
    case = attention_cases.AttentionCase(B=1, T=2, P=P, H=1, S=16, dtype=torch.float16)
    for table in (module.LAUNCH_FORWARD, module.LAUNCH_BACKWARD_QUERY, module.LAUNCH_BACKWARD_KEY):
        monkeypatch.setitem(table, (64, 16), (block_q, block_k, 4, 1, None))
    assert cases.violations(case, space_attention, space_attention_reference, DEVICE) == []


def test_more_frames_than_cls_row_adds_in_one_step_keep_the_error_rule():
    case = attention_cases.AttentionCase(
        B=1, T=cls_row._CHUNKS_PER_STEP + 2, P=1, H=1, S=16, dtype=torch.float32
    )
    assert cases.violations(case, space_attention, space_attention_reference, DEVICE) == []


@pytest.mark.parametrize("op", (space_attention, space_attention_reference))
def test_values_and_gradient_by_hand(op):
    # Two frames of one patch; CLS, a, b with values 0, 4, 8 in the first channel. All keys are zero except
    # that of a, and only the query of a sees it: its score is log 3, all others are 0.
    qkv = torch.zeros(1, 3, 3, 1, 16, device=DEVICE)
    qkv[0, :, 2, 0, 0] = torch.tensor([0.0, 4.0, 8.0])
    qkv[0, 1, 0, 0, 0], qkv[0, 1, 1, 0, 0] = 4.0, math.log(3.0)
    qkv.requires_grad_()
    out = op(qkv, 2)
    # CLS: all three alike, 12 / 3. a: CLS and a with weights 1/4 and 3/4. b: CLS and b with 1/2 each.
    _close(out[0, :, 0], [4.0, 3.0, 4.0])
    assert not out[..., 1:].any()
    d_out = torch.zeros_like(out)
    d_out[0, :, 0] = torch.tensor([3.0, 8.0, 16.0])
    (d_qkv,) = torch.autograd.grad(out, qkv, d_out)
    # d_v: 3/3 + 8/4 + 16/2, 3/3 + 8 * 3/4, 3/3 + 16/2.
    _close(d_qkv[0, :, 2, 0, 0], [11.0, 7.0, 9.0])
    # d score of (a, a): 3/4 * 8 * (4 - 3) = 6, of (CLS, a): 1/3 * 3 * (4 - 4) = 0; the scale is 1/4.
    _close(d_qkv[0, :, 1, 0, 0], [-6.0, 6.0, 0.0])
    _close(d_qkv[0, :, 0, 0, 0], [0.0, 1.5 * math.log(3.0), 0.0])


def test_cls_attends_to_all_frames_and_a_patch_to_its_own():
    qkv = _qkv(N=7)
    changed = qkv.clone()
    changed[0, 4:] += 1.0
    same = (space_attention(qkv, 2) == space_attention(changed, 2)).all(-1)
    assert same.tolist() == [[False, True, True, True, False, False, False]]


def test_repeats_its_bits_and_reads_views():
    views = _qkv(B=2, N=9, H=2).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    dense = views.detach().contiguous().requires_grad_()
    both = []
    for qkv in (views, dense):
        out = space_attention(qkv, 2)
        both.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*both, strict=True))


def test_no_clips_give_no_rows():
    qkv = _qkv()[:0].requires_grad_()
    out = space_attention(qkv, 2)
    assert out.shape == (0, 5, 16)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_float64_is_answered_by_the_reference_and_passes_gradcheck():
    qkv = _qkv(S=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: space_attention(x, 2), qkv)


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs Triton or its interpreter")
def test_registered_op_is_sound():
    torch.library.opcheck(torch.ops.miles_fast.space_attention.default, (_qkv().requires_grad_(), 2, None))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_traces_as_one_graph(backend, dtype):
    qkv = _qkv(dtype=dtype).requires_grad_()

    def square_of_rows(qkv):
        return space_attention(qkv * 2, 2).square().sum()

    compiled_op = torch.compile(square_of_rows, backend=backend, fullgraph=True)
    (compiled,) = torch.autograd.grad(compiled_op(qkv), qkv)
    (expected,) = torch.autograd.grad(square_of_rows(qkv), qkv)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    ("qkv", "num_frames", "message"),
    (
        (torch.zeros(2, 5, 3, 8), 2, r"\(B, N, 3, H, S\)"),
        (torch.zeros(2, 5, 2, 1, 8), 2, r"\(B, N, 3, H, S\)"),
        (torch.zeros(2, 5, 3, 1, 8, dtype=torch.int32), 2, "floating-point"),
        (torch.zeros(2, 5, 3, 1, 8), 3, "multiple of 3 frames"),
        (torch.zeros(2, 1, 3, 1, 8), 1, "1 tokens are not"),
        (torch.zeros(2, 5, 3, 1, 8), 0, "multiple of 0 frames"),
    ),
)
def test_says_what_is_wrong_with_its_inputs(qkv, num_frames, message):
    with pytest.raises(ValueError, match=message):
        space_attention(qkv, num_frames)
