import pytest
import torch
import torch.nn.functional as F

from miles_fast.kernels import cases, layer_cases
from miles_fast.kernels.biased_gelu import biased_gelu, biased_gelu_reference
from miles_fast.kernels.dispatch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs Triton or its interpreter"
)


@pytest.mark.parametrize("case", layer_cases.BIASED_GELU_SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, biased_gelu, biased_gelu_reference, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", layer_cases.BIASED_GELU_TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case):
    assert cases.violations(case, biased_gelu, biased_gelu_reference, "cuda") == []


def test_takes_a_strided_gradient_and_no_rows():
    hidden, bias = torch.randn(4, 6, device=DEVICE, requires_grad=True), torch.zeros(6, device=DEVICE)
    (found,) = torch.autograd.grad(biased_gelu(hidden, bias).T.sum(), hidden)
    (expected,) = torch.autograd.grad(F.gelu(hidden).sum(), hidden)
    torch.testing.assert_close(found, expected)
    bias.requires_grad_()
    (d_bias,) = torch.autograd.grad(biased_gelu(torch.zeros(0, 6, device=DEVICE), bias).sum(), bias)
    assert d_bias.tolist() == [0.0] * 6


@needs_triton
def test_registered_op_is_sound():
    leaves = [torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((3, 5), (5,))]
    torch.library.opcheck(torch.ops.miles_fast.biased_gelu.default, tuple(leaves))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_traces_as_one_graph(backend):
    leaves = [torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((3, 5), (7, 5), (7,))]

    def layer(x, weight, bias):
        return biased_gelu(F.linear(x, weight, bias.detach()), bias)

    ops = (torch.compile(layer, backend=backend, fullgraph=True), layer)
    results = [torch.autograd.grad(op(*leaves).square().sum(), leaves) for op in ops]
    torch.testing.assert_close(*results)


def test_says_what_is_wrong_with_its_inputs():
    with pytest.raises(ValueError, match=r"\(D,\), got torch.float32 \(2, 3\) and \(2,\)"):
        biased_gelu(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="floating-point"):
        biased_gelu(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3))
