"""Whole runs with `run.precision: fp8`: what changes, what does not, and what is refused."""

import math
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file
from tiny import ds_tree, tiny_config, tiny_tree, write_data

import miles_fast
from miles_fast.config import ConfigError
from miles_fast.export.run import export_run
from miles_fast.models.fp8 import use_fp8
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.loop import pretrain
from miles_fast.training.progress import read_log

CUDA = torch.cuda.is_available()


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Definitions, not interpreted kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for op in () if CUDA else ("token_gather", "feature_regression"):
            patch.setattr(f"miles_fast.kernels.{op}.runs_triton", lambda *tensors: False)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("fp8")
    write_data(place)
    return place


def configured(root, folder, method=None, model=None, **run):
    video = {**tiny_tree(root)["model"]["video"], "width": 32, **(model or {})}
    run = {"folder": str(folder), "steps": 6, "log_every": 1, "save_every": 3, "precision": "fp8", **run}
    sections = {"method": method} if method else {}
    return tiny_config(root, run=run, model={"video": video}, **sections)


def train(config, stage=1, resume=None):
    settings = check_ds_config(ds_tree(stage=stage, bf16=CUDA), "ds", config, cuda=CUDA, ranks=1)
    pretrain(config, settings, resume=resume)
    return [record["loss"] for record in read_log(Path(config.run.folder)) if "loss" in record]


@pytest.fixture(scope="module")
def trained(root):
    """Losses of six steps in fp8, and their folder."""
    return train(configured(root, root / "run")), root / "run"


def test_fp8_is_near_the_full_precision_and_not_it(root, trained):
    plain = train(configured(root, root / "plain", precision=None))
    assert all(0 < abs(a - b) < 0.1 for a, b in zip(trained[0], plain, strict=True))


def test_a_resumed_run_equals_one_that_went_on(root, trained):
    losses, folder = trained
    parted = root / "parted" / "checkpoints"
    shutil.copytree(folder / "checkpoints" / "step-00000003", parted / "step-00000003")
    (parted / "latest").write_text("step-00000003\n")
    assert train(configured(root, root / "parted"), resume="auto") == losses[3:]
    for file in ("student/model.safetensors", "snapshot.safetensors"):
        whole, halves = (
            load_file(place / "step-00000006" / file) for place in (folder / "checkpoints", parted)
        )
        assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)


def test_fp8_is_the_runs_and_not_the_models(root, trained):
    """A run goes on in bf16 from fp8's checkpoint, and an export computes as any other does."""
    _, folder = trained
    checkpoint = str(folder / "checkpoints" / "step-00000003")
    assert len(train(configured(root, root / "other", precision=None), resume=checkpoint)) == 3
    export_run(folder, root / "export")
    model = miles_fast.load(root / "export")
    video = torch.randn(1, 2, 3, 32, 32)
    exact = model.embed_video(video)
    use_fp8(model, torch.device("cpu"))
    far = (model.embed_video(video) - exact).norm() / exact.norm()
    assert 1e-3 < far < 0.2


def test_the_loss_falls(root, tmp_path):
    losses = train(configured(root, tmp_path / "long", steps=60, save_every=60))
    assert mean(losses[-20:]) < mean(losses[:20]) - 0.2


def test_zero_3_gathers_the_weights_that_fp8_reads(root, trained, tmp_path):
    near = 1e-2 if CUDA else 1e-4  # in bf16 the stages round sums of gradients differently
    assert train(configured(root, tmp_path / "three"), stage=3) == pytest.approx(trained[0], rel=near)


def test_view_d_and_its_predictor(root, tmp_path):
    method = {"view": "D", "predictor": {"width": 16, "depth": 1, "heads": 2}}
    losses = {
        precision: train(configured(root, tmp_path / str(precision), method, precision=precision, steps=2))
        for precision in ("fp8", None)
    }
    assert all(map(math.isfinite, losses["fp8"]))
    assert losses["fp8"] == pytest.approx(losses[None], abs=0.05) and losses["fp8"] != losses[None]


def test_what_fp8_cannot_do_is_refused(root, monkeypatch):
    with pytest.raises(ConfigError, match=r"tiny: .*model.video.width = 24: run.precision = fp8 takes mult"):
        configured(root, "x", model={"width": 24})
    with pytest.raises(ConfigError, match=r"mlp_ratio = 40: run.precision = fp8"):
        configured(root, "x", model={"mlp_ratio": 1.25})
    with pytest.raises(ConfigError, match=r"predictor.width = 24"):
        configured(root, "x", method={"view": "D", "predictor": {"width": 24, "heads": 2}})
    with pytest.raises(ConfigError, match=r"run.precision = 'fp16': Input should be 'fp8'"):
        configured(root, "x", precision="fp16")
    with pytest.raises(ConfigError, match=r"ds: bf16.enabled = false, but run.precision = fp8 takes bf16"):
        check_ds_config(ds_tree(), "ds", configured(root, "x"), cuda=True, ranks=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"a GPU that multiplies fp8 \(H100.*NVIDIA A100; take"):
        use_fp8(torch.nn.Module(), torch.device("cuda", 0))


@pytest.mark.gpu
def test_graphs_compute_what_the_operators_do(root, tmp_path):
    launched = train(configured(root, tmp_path / "operators"))
    assert train(configured(root, tmp_path / "graphs", cuda_graphs=True)) == launched
    compiled = train(configured(root, tmp_path / "compiled", cuda_graphs=True, compile=True))
    assert compiled == pytest.approx(launched, rel=2e-2)  # bf16, rounded elsewhere
