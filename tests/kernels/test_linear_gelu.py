import pytest
import torch
import torch.nn.functional as F

from miles_fast.kernels import cases, layer_cases
from miles_fast.kernels import linear_gelu as module
from miles_fast.kernels.dispatch import INTERPRETED
from miles_fast.kernels.linear_gelu import linear_gelu, linear_gelu_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = INTERPRETED or (DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0))
needs_kernel = pytest.mark.skipif(not FUSED, reason="needs a Hopper GPU or Triton's interpreter")


def leaves(M=130, K=72, D=264, dtype=torch.float16, device=DEVICE):
    return [torch.randn(*shape, device=device, dtype=dtype) / 4 for shape in ((M, K), (D, K), (D,))]


@pytest.mark.parametrize("case", layer_cases.LINEAR_GELU_SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, linear_gelu, linear_gelu_reference, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", layer_cases.LINEAR_GELU_TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case):
    assert cases.violations(case, linear_gelu, linear_gelu_reference, "cuda") == []


@needs_kernel
def test_one_kernel_stores_hidden_for_backward_alone(monkeypatch):
    kept = []
    launch = module._linear_gelu
    monkeypatch.setattr(module, "_linear_gelu", lambda *args: kept.append(args[-1]) or launch(*args))
    x, weight, bias = leaves()
    with torch.no_grad():
        lean = linear_gelu(x, weight, bias)
    out = linear_gelu(x.requires_grad_(), weight, bias)
    assert kept == [False, True] and torch.equal(out, lean)
    assert not launch(x, weight, bias, False)[1].numel()


@pytest.mark.parametrize(
    "shape", [dict(K=68), dict(D=260), dict(M=100), dict(D=248), dict(K=56), dict(dtype=torch.float32)]
)
def test_takes_what_the_kernel_does_not(monkeypatch, shape):
    monkeypatch.setattr(module, "_linear_gelu", None)
    inputs = [leaf.requires_grad_() for leaf in leaves(**shape)]
    found, expected = linear_gelu(*inputs), linear_gelu_reference(*inputs)
    tolerance = dict(rtol=1e-5, atol=1e-5) if found.dtype == torch.float32 else dict(rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = [torch.autograd.grad(out.square().mean(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("sizes,dtype", [((3, 5, 6, 10), torch.float32), ((2, 65, 72, 264), torch.float16)])
def test_is_a_linear_layer_and_its_gelu(sizes, dtype):
    B, N, K, D = sizes
    layer = torch.nn.Linear(K, D).to(DEVICE, dtype)
    x = torch.randn(B, N, K, device=DEVICE, dtype=dtype, requires_grad=True)
    leaves = (x, layer.weight, layer.bias)
    weight = torch.randn(B, N, D, device=DEVICE, dtype=dtype)
    tolerance = {} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    found, expected = linear_gelu(*leaves), F.gelu(layer(x))
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = [torch.autograd.grad((out * weight).sum(), leaves) for out in (found, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


def test_takes_clips_of_tokens_by_stride():
    x, weight, bias = leaves()
    by_stride = x.view(2, 65, 72).transpose(0, 1)
    expected = linear_gelu_reference(by_stride, weight, bias)
    torch.testing.assert_close(linear_gelu(by_stride, weight, bias), expected, rtol=2e-2, atol=2e-3)


def test_takes_a_weight_that_lies_anywhere():
    x, weight, bias = leaves()
    flat = torch.cat([weight.new_zeros(1), weight.flatten()])
    found = linear_gelu(x, flat[1:].view_as(weight), bias)
    assert flat[1:].data_ptr() % 16 and torch.equal(found, linear_gelu(x, weight, bias))


@needs_kernel
def test_registered_op_is_sound():
    inputs = [leaf.requires_grad_() for leaf in leaves()]
    torch.library.opcheck(torch.ops.miles_fast.linear_gelu.default, (*inputs, True))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_traces_as_one_graph(backend):
    inputs = [leaf.requires_grad_() for leaf in leaves()]
    ops = (torch.compile(linear_gelu, backend=backend, fullgraph=True), linear_gelu)
    results = [torch.autograd.grad(op(*inputs).float().square().mean(), inputs) for op in ops]
    torch.testing.assert_close(*results)


def test_products_are_counted():
    """Of what is only estimated, a memory budget would choose to compute the products again."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [leaf.requires_grad_() for leaf in leaves()]
    with FlopCounterMode(display=False) as fused:
        linear_gelu(*inputs).float().sum().backward()
    with FlopCounterMode(display=False) as plain:
        linear_gelu_reference(*inputs).float().sum().backward()
    assert fused.get_total_flops() == plain.get_total_flops() > 0
