import pytest
import torch

from miles_fast.kernels import cases, token_cases
from miles_fast.kernels.dispatch import INTERPRETED
from miles_fast.kernels.token_gather import token_gather, token_gather_reference
from miles_fast.kernels.token_index import invert_token_index, invert_token_index_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _tokens(B=2, N=5, D=8):
    return torch.arange(B * N * D, dtype=torch.float32, device=DEVICE).view(B, N, D)


def _index(*rows, dtype=torch.int64):
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("case", token_cases.TOKEN_GATHER_SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, token_gather, token_gather_reference, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", token_cases.TOKEN_GATHER_TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case):
    assert cases.violations(case, token_gather, token_gather_reference, "cuda") == []


@pytest.mark.parametrize("op", (token_gather, token_gather_reference))
def test_values_and_gradient_by_hand(op):
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], device=DEVICE, requires_grad=True)
    rows = op(tokens, _index([2, 0]))
    assert rows.tolist() == [[[5.0, 6.0], [1.0, 2.0]]]
    (d_tokens,) = torch.autograd.grad(rows, tokens, torch.tensor([[[7.0, 8.0], [9.0, 10.0]]], device=DEVICE))
    assert d_tokens.tolist() == [[[9.0, 10.0], [0.0, 0.0], [7.0, 8.0]]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_copies_bits_both_ways(dtype):
    case = token_cases.TokenGatherCase(B=2, N=12, M=5, D=33, dtype=dtype)
    inputs = case.inputs(DEVICE)
    fused = cases.output_and_gradient(case, token_gather, inputs)
    plain = cases.output_and_gradient(case, token_gather_reference, inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fused, plain, strict=True))


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
def test_inverse_index_matches_its_reference(dtype):
    index = _index([3, 0, 4], [1, 2, 0], dtype=dtype)
    inverse = invert_token_index(index, 6)
    assert inverse.tolist() == [[1, -1, -1, 0, 2, -1], [2, 0, 1, -1, -1, -1]]
    assert torch.equal(inverse, invert_token_index_reference(index, 6))


def test_reads_views_through_their_strides():
    channels_first = _tokens(2, 8, 5).transpose(1, 2)
    index = _index([4, 1], [0, 3])
    assert torch.equal(token_gather(channels_first, index), token_gather_reference(channels_first, index))
    narrow = _tokens(2, 5, 20)[..., 4:12]
    assert torch.equal(token_gather(narrow, index), token_gather_reference(narrow, index))
    tokens = _tokens().requires_grad_()
    (d_tokens,) = torch.autograd.grad(token_gather(tokens, index).sum(), tokens)
    assert d_tokens[:, :, 0].tolist() == [[0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0]]


def test_float64_is_answered_by_the_reference_and_passes_gradcheck():
    tokens = _tokens(2, 4, 3).double().requires_grad_()
    index = _index([3, 1], [0, 2])
    assert torch.autograd.gradcheck(lambda x: token_gather(x, index), tokens)


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs Triton or its interpreter")
def test_registered_op_is_sound():
    tokens, index = _tokens(2, 5, 8).requires_grad_(), _index([4, 1, 0], [0, 3, 2])
    torch.library.opcheck(torch.ops.miles_fast.token_gather.default, (tokens, index))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_traces_as_one_graph(backend, dtype):
    tokens = _tokens().to(dtype).requires_grad_()
    index = _index([4, 1], [0, 3])

    def square_of_rows(tokens, index):
        return token_gather(tokens[:, 1:] * 2, index - (index > 0).long()).square().sum()

    (compiled,) = torch.autograd.grad(
        torch.compile(square_of_rows, backend=backend, fullgraph=True)(tokens, index), tokens
    )
    (expected,) = torch.autograd.grad(square_of_rows(tokens, index), tokens)
    assert torch.equal(compiled, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("bad", (-1, 5))
def test_index_out_of_range_raises_on_the_cpu(bad, dtype):
    tokens, index = torch.zeros(2, 5, 8, dtype=dtype), torch.tensor([[0, 1], [2, bad]])
    with pytest.raises(IndexError, match=r"index_BM .* tokens 0\.\.4"):
        token_gather(tokens, index)


@pytest.mark.gpu
def test_index_out_of_range_is_nan_on_a_gpu():
    rows = token_gather(_tokens(), _index([0, 5], [-1, 2]))
    assert rows.isnan().all(dim=-1).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("tokens", "index", "message"),
    (
        (torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64), r"\(B, N, D\)"),
        (torch.zeros(2, 5, 8, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64), "floating-point"),
        (torch.zeros(2, 5, 8), torch.zeros(2, 1), "int64 or int32"),
        (torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool), "int64 or int32"),
        (torch.zeros(2, 5, 8), torch.zeros(3, 1, dtype=torch.int64), "B = 2 clips"),
        (torch.zeros(2, 5, 8), torch.zeros(2, dtype=torch.int64), "B = 2 clips"),
        (torch.zeros(2, 5, 8), torch.zeros(2, 1, dtype=torch.int64, device="meta"), "is on meta"),
        (torch.zeros(2, 5, 8), torch.tensor([[0, 1], [3, 3]]), "token twice"),
    ),
)
def test_says_what_is_wrong_with_its_inputs(tokens, index, message):
    with pytest.raises(ValueError, match=message):
        token_gather(tokens, index)
