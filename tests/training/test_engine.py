"""DeepSpeed's optimizers with gradients taken together, against their own way; rates of parameter groups."""

import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import FLOAT32_SUMS, NOTHING_STAYS, ds_tree, tiny_config, write_data
from torch import nn
from torch._dynamo.backends.debugging import aot_eager_decomp_partition

from miles_fast.config import ConfigError
from miles_fast.models.dual_encoder import build_dual_encoder
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training import engine as engine_module
from miles_fast.training.checkpoint import model_folder
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.engine import (
    build_engine,
    init_process_group,
    joined_norms,
    parameter_groups,
    release_engine,
)
from miles_fast.training.loop import pretrain
from miles_fast.training.progress import read_log


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


# Summed over ranks as they are: DeepSpeed would round them to bf16, over one rank as well.
FLOAT32 = {**FLOAT32_SUMS, "communication_data_type": "fp32"}


def float32_weights(engine, stage, dtypes):
    held = "fp32_groups_flat_partition" if dtypes else "single_partition_of_fp32_groups"
    held = "fp32_partitioned_groups_flat" if stage == 3 else held
    return [partition.detach().clone() for partition in getattr(engine.optimizer, held)]


def run(root, accumulation, clipping, stage=1, bf16=True, dtypes=FLOAT32):
    init_process_group()
    tree = ds_tree(stage=stage, batch=2, accumulation=accumulation, bf16=bf16)
    tree |= {**dtypes, "gradient_clipping": clipping}
    torch.manual_seed(0)
    engine = build_engine(Net(), check_ds_config(tree, "ds", tiny_config(root), cuda=False, ranks=1))
    norms = []
    for micro_step in range(4 * accumulation):
        inputs = torch.randn(2, 6, dtype=torch.bfloat16 if bf16 else torch.float32)
        engine.backward(engine(inputs, micro_step >= 2))
        engine.step()
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    masters = float32_weights(engine, stage, dtypes)
    release_engine(engine)
    return norms, masters


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clipping", [0.0, 0.05, 1e6])
def test_flat_gradients_train_as_deepspeed_does(root, monkeypatch, capsys, accumulation, clipping):
    norms, masters = run(root, accumulation, clipping)
    assert "Virtual Memory" not in capsys.readouterr().out  # DeepSpeed's, of every start
    monkeypatch.setattr(engine_module, "use_flat_gradients", lambda optimizer, in_parts: None)
    own_norms, own_masters = run(root, accumulation, clipping)
    assert norms == pytest.approx(own_norms, rel=1e-6) and max(norms) > 0.05
    for one, two in zip(masters, own_masters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stage,bf16", [(1, True), (2, True), (2, False), (3, True), (3, False)])
@pytest.mark.parametrize("clipping", [0.05, 1e6])
def test_gradients_measured_together_train_as_deepspeed_does(root, monkeypatch, stage, bf16, clipping):
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    with monkeypatch.context() as without:
        without.setattr(stage_1_and_2, "has_inf_or_nan", None)
        without.setattr(stage3, "get_norm_dtype", None)
        norms, masters = run(root, 1, clipping, stage, bf16, dtypes={})
    monkeypatch.setattr(engine_module, "measure_gradients_together", lambda optimizer: None)
    own_norms, own_masters = run(root, 1, clipping, stage, bf16, dtypes={})
    assert norms == pytest.approx(own_norms, rel=1e-6) and max(norms) > 0.05
    for one, two in zip(masters, own_masters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_say_what_is_not_finite(device, dtype):
    gradients = [None, torch.empty(0), torch.randn(70_000), torch.full((3,), -2.0), torch.randn(5, 7)]
    gradients = [None if one is None else one.to(device, dtype) for one in gradients]
    for order in (2, math.inf):
        found = joined_norms(gradients, order, device)
        expected = [0.0, *(torch.linalg.vector_norm(one.double(), order).item() for one in gradients[2:])]
        assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, rel=1e-5)
        for what in ("nan", "inf", "-inf"):
            spoiled = gradients[2].clone()
            spoiled[69_990] = float(what)
            assert not joined_norms([*gradients, spoiled], order, device).isfinite().all()
    assert joined_norms([None], 2, device).tolist() == [0.0]


@pytest.mark.parametrize("what", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("stage,dtypes", [(1, FLOAT32), (1, {}), (2, {}), (3, {})])
def test_a_gradient_that_is_not_finite_still_stops_the_step(root, stage, dtypes, what):
    init_process_group()
    tree = ds_tree(stage=stage, batch=2, bf16=True) | dtypes
    engine = build_engine(Net(), check_ds_config(tree, "ds", tiny_config(root), cuda=False, ranks=1))
    before = float32_weights(engine, stage, dtypes)
    engine.module.first.bias.register_hook(
        lambda gradient: gradient.index_fill(0, torch.tensor(3), float(what))
    )
    engine.backward(engine(torch.ones(2, 6, dtype=torch.bfloat16), True))
    engine.step()
    assert engine.optimizer.overflow
    assert sum(map(len, before)) >= 59  # Net has that many, DeepSpeed pads them
    assert all(map(torch.equal, before, float32_weights(engine, stage, dtypes)))
    if dtypes:
        assert all(not flat.any() for flat in engine.optimizer.fp32_groups_gradients_flat)
    release_engine(engine)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_first_step_of_adam_is_as_long_as_lr_scale_says(root, tmp_path, stage):
    scales = {"vid_proj.": 0.1, "video_model.blocks.": 0.5, "video_model.blocks.1.": 0.25}
    run = {"folder": str(tmp_path / "run"), "steps": 1, "lr_scale": scales}
    config = tiny_config(root, run=run, method={"view": "none"}, model={"attention": "sdpa"})
    tree = ds_tree(stage=stage)
    tree["optimizer"]["params"] |= {"weight_decay": 0.0, "eps": 1e-12}
    pretrain(config, check_ds_config(tree, "ds", config, cuda=False, ranks=1))
    torch.manual_seed(config.run.seed)
    tokenizer = load_tokenizer(config.model.text.tokenizer_source)
    start = build_dual_encoder(config.model, len(tokenizer)).state_dict()
    end = load_file(model_folder(tmp_path / "run") / "model.safetensors")
    expected = {**scales, "video_model.blocks.0.": 0.5, "text_model.": 1.0, "text_proj.": 1.0}
    del expected["video_model.blocks."]
    for prefix, scale in expected.items():
        moved = max(float((end[n] - start[n]).abs().max()) for n in end if n.startswith(prefix))
        assert moved == pytest.approx(1e-3 * scale, rel=1e-2), prefix


def test_zero_3_evaluates_the_whole_student(root, tmp_path):
    seen = {}

    def evaluate(model, device):
        assert model.embed_video(torch.zeros(2, 2, 3, 32, 32, device=device)).isfinite().all()
        seen.update(model.state_dict())
        return {}

    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 2})
    pretrain(config, check_ds_config(ds_tree(stage=3), "ds", config, cuda=False, ranks=1), evaluate=evaluate)
    end = load_file(model_folder(tmp_path / "run") / "model.safetensors")
    assert seen.keys() <= end.keys() and all(torch.equal(seen[name], end[name]) for name in seen)


FROZEN = ("patch_embed.", "cls_", "pos_", "temporal_", "blocks.0.", "blocks.1.")


@pytest.mark.parametrize(("stage", "freeze"), [(3, ()), (1, FROZEN)], ids=["zero 3", "frozen"])
def test_compiled_layers_compute_what_uncompiled_ones_do(root, tmp_path, monkeypatch, stage, freeze):
    """Without the code's generation, which takes minutes on a CPU; of more layers than are compiled anew."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager_decomp_partition)
    video = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 10, "heads": 2, "num_frames": 2}

    def losses(stage, compiled):
        torch._dynamo.reset()
        folder = tmp_path / f"{stage} {compiled}"
        run = {"folder": str(folder), "steps": 2, "compile": compiled}
        run["freeze"] = [f"video_model.{name}" for name in freeze]
        config = tiny_config(root, run=run, method={"view": "D"}, model={"video": video})
        config = replace(config, model=replace(config.model, text=replace(config.model.text, dropout=0.0)))
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            tree = ds_tree(stage=stage)
            if stage == 3:
                tree["zero_optimization"] |= NOTHING_STAYS
            pretrain(config, check_ds_config(tree, "ds", config, cuda=False, ranks=1))
        return [record["loss"] for record in read_log(folder)]

    assert losses(stage, True) == pytest.approx(losses(1, False), rel=1e-4)


def test_a_scale_that_would_do_nothing_is_refused(root, tmp_path):
    def settings(scales, **changes):
        config = tiny_config(root, run={"folder": str(tmp_path), "lr_scale": scales})
        return check_ds_config(ds_tree() | changes, "ds.json", config, cuda=False, ranks=1)

    with pytest.raises(ConfigError, match="no trained weight's name begins with 'video.'"):
        parameter_groups(Net(), settings({"first.": 0.1, "video.": 0.1}))
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}
    with pytest.raises(ConfigError, match="ds.json: scheduler.type = WarmupLR sets one rate"):
        settings({"first.": 0.1}, scheduler=schedule)
    with pytest.raises(ConfigError, match="needs optimizer.params.lr"):
        settings({"first.": 0.1}, optimizer={"type": "AdamW"})
    with pytest.raises(ConfigError, match="lr_scale"):
        settings({"first.": 0.0})


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"fp16": None}, "fp16 = None: give an object"),
        ({"bf16": True}, "bf16 = True: give an object"),
        ({"scheduler": {"type": "WarmupLR", "params": 3}}, "scheduler.params = 3: give an object"),
        ({"optimizer": "AdamW"}, "optimizer = 'AdamW': give an object"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.type is missing"),
        ({"gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps = 'auto'"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0"),
        ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu = True"),
        ({"gradient_clipping": "auto"}, "gradient_clipping = 'auto'"),
        ({"gradient_clipping": -1}, "gradient_clipping = -1: give the largest norm"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype: only grad_accum_dtype"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'"),
    ],
)
def test_a_json_of_another_shape_is_refused_by_key(root, changes, said):
    with pytest.raises(ConfigError, match=f"ds.json: {re.escape(said)}"):
        check_ds_config(ds_tree() | changes, "ds.json", tiny_config(root), cuda=False, ranks=1)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"optimizer": {"type": "Nope", "params": {"lr": 1e-3}}}, "Nope is not a supported"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "lrr": 1}}}, "lrr"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-3", "torch_adam": True}}}, "'<='"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup": 3}}}, "warmup"),
        ({"amp": {"enabled": True}}, "Apex AMP integration has been removed"),
    ],
)
def test_what_deepspeed_refuses_is_said_with_the_file(root, changes, said):
    settings = check_ds_config(ds_tree() | changes, "ds.json", tiny_config(root), cuda=False, ranks=1)
    init_process_group()
    with pytest.raises(ConfigError, match=f"ds.json: DeepSpeed refuses it: .*{said}"):
        build_engine(Net(), settings)


def test_adam_is_torchs_without_a_gpu_unless_the_json_says_otherwise(root):
    def params(cuda, **changes):
        tree = ds_tree(stage=1) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, **changes}}}
        return check_ds_config(tree, "ds", tiny_config(root), cuda=cuda, ranks=1).tree["optimizer"]["params"]

    assert params(False)["torch_adam"] is True and params(False, torch_adam=False)["torch_adam"] is False
    assert "torch_adam" not in params(True)
