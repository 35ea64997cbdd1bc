import pytest
import torch
import torch.nn.functional as F

from miles_fast.kernels import cases, layer_cases
from miles_fast.kernels import linear as module
from miles_fast.kernels.dispatch import quack_for
from miles_fast.kernels.linear import linear, product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUACK = quack_for(torch.empty(0, device=DEVICE))
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
        module, "product", lambda x, w, b, transposed: F.linear(x, w if transposed else w.T, b)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_a_linear_layers(everywhere, bias):
    x, weight, bias_D = (leaf.double().requires_grad_() for leaf in leaves(M=6, K=10, D=7))
    inputs = (x.detach().view(2, 3, 10).requires_grad_(), weight, *([bias_D] if bias else []))
    outputs = linear(*inputs), F.linear(*inputs)
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


@pytest.mark.parametrize("transposed", [True, False])
def test_registered_op_is_sound(transposed):
    x, weight, bias = leaves(K=192, D=192)
    for given in (bias, None):
        torch.library.opcheck(torch.ops.miles_fast.product.default, (x, weight, given, transposed))


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
    assert torch.equal(product(x, *others, True), product(x, *flat, True))
