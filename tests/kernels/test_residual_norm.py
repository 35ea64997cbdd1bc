import pytest
import torch
import torch.nn.functional as F

from miles_fast.kernels import cases, layer_cases
from miles_fast.kernels.dispatch import INTERPRETED
from miles_fast.kernels.residual_norm import residual_norm, residual_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs Triton or its interpreter"
)


def _leaves(rows=6, width=5):
    drawn = (torch.randn(2, rows, width, device=DEVICE), *torch.randn(4, width, device=DEVICE))
    return [leaf.requires_grad_() for leaf in drawn]


@pytest.mark.parametrize("case", layer_cases.RESIDUAL_NORM_SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, residual_norm, residual_norm_reference, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", layer_cases.RESIDUAL_NORM_TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case):
    assert cases.violations(case, residual_norm, residual_norm_reference, "cuda") == []


def test_biases_held_elsewhere_get_the_gradients_of_layers_that_own_them():
    leaves = x, weight, bias, branch_bias, later_bias = _leaves()

    def layer(own):
        kept = (lambda b: b) if own else torch.Tensor.detach
        biases = () if own else (branch_bias, later_bias)
        out, total = residual_norm(x.sin() + kept(branch_bias), weight, bias, *biases)
        return total + (out.cos() + kept(later_bias))

    found, expected = (torch.autograd.grad(layer(own).square().sum(), leaves) for own in (False, True))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("used", ("out", "total", "both", "out without total"))
def test_gradients_reach_what_is_used(used):
    x, weight, bias, *_ = _leaves()
    out, total = residual_norm(x, weight, bias, with_total=used != "out without total")
    assert (total is None) == (used == "out without total")
    plain = F.layer_norm(x, (5,), weight, bias, 1e-6)
    shares = {"out": (1, 0), "total": (0, 1), "both": (1, 1)}.get(used, (1, 0))
    loss = sum(part.sin().sum() for part, share in zip((out, total), shares, strict=True) if share)
    expected = shares[0] * plain.sin().sum() + shares[1] * x.sin().sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, [x, weight, bias], allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, [x, weight, bias]),
    )


def test_takes_strided_tensors_and_no_rows():
    x, weight, bias, *_ = _leaves()
    flipped = residual_norm(x.transpose(0, 1), weight, bias)[0].transpose(0, 1)
    straight = residual_norm(x, weight, bias)[0]
    torch.testing.assert_close(flipped, straight)
    torch.testing.assert_close(
        torch.autograd.grad(flipped.mT.sin().sum(), x), torch.autograd.grad(straight.mT.sin().sum(), x)
    )
    nothing = residual_norm(x[:0], weight, bias)[0]
    assert torch.autograd.grad(nothing.sum(), weight)[0].tolist() == [0.0] * 5


@needs_triton
def test_registered_op_is_sound():
    rows = torch.randn(3, 5, device=DEVICE)
    statistics = torch.randn(3, 1, device=DEVICE)
    for d_later in (None, rows):
        arguments = (rows, d_later, rows, torch.randn(5, device=DEVICE), statistics, statistics)
        torch.library.opcheck(torch.ops.miles_fast.residual_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("with_total", (False, True))
def test_traces_as_one_graph(backend, with_total):
    leaves = _leaves()

    def layer(x, weight, bias, branch_bias, later_bias):
        x = x.sin() + branch_bias.detach()
        biases = (branch_bias, later_bias) if with_total else (branch_bias,)
        out, total = residual_norm(x, weight, bias, *biases, with_total=with_total)
        return total + out.cos() + later_bias.detach() if with_total else out + later_bias

    ops = (torch.compile(layer, backend=backend, fullgraph=True), layer)
    results = [torch.autograd.grad(op(*leaves).square().sum(), leaves) for op in ops]
    torch.testing.assert_close(*results)


def test_says_what_is_wrong_with_its_inputs():
    x, vector = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"must be floating-point, got torch.int64 \(2, 3\)"):
        residual_norm(x.long(), vector, vector)
    with pytest.raises(
        ValueError, match=r"must be \(3,\) of one dtype, got torch.float32 \(3,\), torch.float32 \(2,\)"
    ):
        residual_norm(x, vector, torch.zeros(2))
