"""DeepSpeed's bf16 optimizer with its gradient taken flat, against its own way."""

import pytest
import torch
from tiny import ds_tree, tiny_config, write_data
from torch import nn

from miles_fast.training import engine as engine_module
from miles_fast.training.engine import build_engine, check_ds_config, init_process_group


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("engine")
    write_data(place)
    return place


class Net(nn.Module):
    """Two layers, of which the second joins from the third micro step on."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x, with_second):
        hidden = self.first(x).tanh()
        return (self.second(hidden) if with_second else hidden).float().square().sum()


def run(root, accumulation, clipping):
    init_process_group()
    tree = ds_tree(stage=1, batch=2, accumulation=accumulation, bf16=True)
    # Summed over ranks as they are: DeepSpeed would round them to bf16, over one rank as well.
    tree |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    tree |= {"gradient_clipping": clipping}
    torch.manual_seed(0)
    engine = build_engine(Net(), check_ds_config(tree, "ds", tiny_config(root), cuda=False, ranks=1))
    norms = []
    for micro_step in range(4 * accumulation):
        engine.backward(engine(torch.randn(2, 6, dtype=torch.bfloat16), micro_step >= 2))
        engine.step()
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    masters = [partition.detach().clone() for partition in engine.optimizer.fp32_groups_flat_partition]
    engine.destroy()
    return norms, masters


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clipping", [0.0, 0.05, 1e6])
def test_flat_gradients_train_as_deepspeed_does(root, monkeypatch, accumulation, clipping):
    norms, masters = run(root, accumulation, clipping)
    monkeypatch.setattr(engine_module, "use_flat_gradients", lambda optimizer: None)
    own_norms, own_masters = run(root, accumulation, clipping)
    assert norms == pytest.approx(own_norms, rel=1e-6) and max(norms) > 0.05
    for one, two in zip(masters, own_masters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_a_gradient_that_is_not_finite_still_stops_the_step(root):
    init_process_group()
    tree = ds_tree(stage=1, batch=2, bf16=True) | {"data_types": {"grad_accum_dtype": "fp32"}}
    engine = build_engine(Net(), check_ds_config(tree, "ds", tiny_config(root), cuda=False, ranks=1))
    before = [partition.detach().clone() for partition in engine.optimizer.fp32_groups_flat_partition]
    engine.backward(engine(torch.full((2, 6), float("nan"), dtype=torch.bfloat16), True))
    engine.step()
    assert engine.optimizer.overflow
    assert all(map(torch.equal, before, engine.optimizer.fp32_groups_flat_partition))
    assert all(not flat.any() for flat in engine.optimizer.fp32_groups_gradients_flat)
    engine.destroy()
