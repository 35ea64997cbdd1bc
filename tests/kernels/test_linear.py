import pytest
import torch
import torch.nn.functional as F

from miles_fast.kernels import cases, layer_cases
from miles_fast.kernels import linear as module
from miles_fast.kernels.dispatch import quack_for
from miles_fast.kernels.linear import linear, product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUACK = quack_for(torch.device(DEVICE))
needs_quack = pytest.mark.skipif(not QUACK, reason="needs a Hopper GPU and quack-kernels")


def leaves(M=8200, K=192, D=384, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(*shape, device=DEVICE, dtype=dtype) / 4 for shape in ((M, K), (D, K), (D,))]


@pytest.mark.parametrize("case", layer_cases.LINEAR_SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, linear, F.linear, DEVICE) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", layer_cases.LINEAR_TRAINER, ids=lambda case: case.name)
def test_keeps_the_error_rule_at_the_trainers_shapes(case):
    assert cases.violations(case, linear, F.linear, "cuda") == []


@pytest.fixture
def everywhere(monkeypatch):
    """The op's own gradients, also where no quack computes its products."""
    monkeypatch.setattr(module, "_takes_quack", lambda *_: True)
    monkeypatch.setattr(
        module,
        "product",
        lambda x, w, b, given, r=None: F.linear(x, w if given else w.T, b) + (0 if r is None else r),
    )


@pytest.mark.parametrize("given", ["bias", "nothing", "bias and residual"])
def test_gradients_are_a_linear_layers(everywhere, given):
    x, weight, bias = (leaf.double().requires_grad_() for leaf in leaves(M=6, K=10, D=7))
    residual = torch.randn(2, 3, 7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    more = {"bias": (bias,), "nothing": (), "bias and residual": (bias, residual)}[given]
    inputs = (x.detach().view(2, 3, 10).requires_grad_(), weight, *more)
    outputs = linear(*inputs), F.linear(*inputs[:3]) + sum(inputs[3:])
    torch.testing.assert_close(*outputs)
    d_out = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, d_out) for out in outputs))


def test_nothing_is_computed_for_what_needs_no_gradient(everywhere):
    x, weight, bias = leaves(M=6, K=10, D=7)
    out = linear(x, weight.requires_grad_(), bias)
    seen = []
    with _Watch(seen):
        out.sum().backward()
    assert weight.grad is not None and seen.count("mm") == 1


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@needs_quack
def test_quack_takes_wide_products_of_many_rows(monkeypatch):
    taken = []
    monkeypatch.setattr(
        QUACK, "product", lambda x, *_: taken.append(tuple(x.shape)) or x.new_zeros(len(x), 384)
    )
    linear(*leaves())
    linear(*leaves(M=100))
    linear(*leaves(D=200))
    linear(*leaves(dtype=torch.float32))
    assert taken == [(8200, 192)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_is_added_to_a_residual(dtype):
    inputs = leaves(dtype=dtype)
    drawn = torch.randn(384, 8201, device=DEVICE, dtype=dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    misaligned = drawn.flatten()[1 : 1 + 8200 * 384].view(8200, 384)
    for residual in (drawn[:, 1:].T, drawn.T[1:].contiguous(), misaligned):
        expected = residual.double() + F.linear(*(tensor.double() for tensor in inputs))
        for found in (linear(*inputs, residual), product(*inputs, True, residual)):
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_says_what_a_residual_needs():
    x, weight, bias = leaves(M=6, K=10, D=7)
    residual = torch.zeros(6, 7, device=DEVICE, dtype=x.dtype)
    for more in ((None, residual), (bias, residual.double())):
        with pytest.raises(ValueError, match="needs a bias and the dtype of x"):
            linear(x, weight, *more)


@pytest.mark.parametrize("transposed", [True, False])
def test_registered_op_is_sound(transposed):
    x, weight, bias = leaves(K=192, D=192)
    for more in ((bias, transposed, None), (None, transposed, None), (bias, transposed, x)):
        torch.library.opcheck(torch.ops.miles_fast.product.default, (x, weight, *more))


@pytest.mark.parametrize("compiler", ("eager", "aot_eager"))
def test_traces_as_one_graph(compiler):
    inputs = [leaf.requires_grad_() for leaf in leaves()]
    ops = (torch.compile(linear, backend=compiler, fullgraph=True), linear)
    results = [torch.autograd.grad(op(*inputs).float().square().mean(), inputs) for op in ops]
    torch.testing.assert_close(*results)


@needs_quack
def test_takes_weights_that_lie_anywhere():
    x, *others = leaves()
    flat = [torch.cat([leaf.new_zeros(1), leaf.flatten()])[1:].view_as(leaf) for leaf in others]
    assert all(leaf.data_ptr() % 16 for leaf in flat)
    assert torch.equal(*(product(x, *weights, True, None) for weights in (others, flat)))
