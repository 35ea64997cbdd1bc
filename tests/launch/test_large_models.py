"""launch/configs of the large models: counted, planned for, and stepped at ZeRO 3 with one layer each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_tree, write_data

from miles_fast.config_tree import load_config
from miles_fast.training.ds_config import read_ds_config
from miles_fast.training.planning import Links, Measured, model_sizes, plan
from miles_fast.training.progress import read_log

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


@pytest.mark.parametrize("name,stage,tower", [("vit_l", 2, 404e6), ("vit_h", 3, 841e6)])
def test_the_plan_knows_them(name, stage, tower):
    config = load_config(LAUNCH / "configs" / f"{name}.yaml")
    settings = read_ds_config(LAUNCH / "ds" / f"zero{stage}.json", config, cuda=True, ranks=1)
    sizes = model_sizes(config, 30522)
    assert sizes.snapshot == pytest.approx(tower, rel=2e-3)
    assert sizes.trained - sizes.snapshot == pytest.approx(66.6e6, rel=5e-3)  # DistilBERT and its projection
    measured = Measured(clips_per_second=100.0, step_seconds=0.64, memory_gib=70.0)
    one, many = (plan(config, settings, sizes, measured, Links(), gpus) for gpus in (1, 64))
    # What 64 GPUs share: optimizer, gradients; at ZeRO 3 the average, and the weights but for those gathered.
    saved = (12 + 2) * sizes.trained * 63 / 64
    if stage == 3:
        saved += (2 * sizes.trained + 4 * sizes.snapshot) * 63 / 64 - 2 * sizes.trained
    saved /= 2**30
    assert one.state_gib - many.state_gib == pytest.approx(saved)
    # Of the contrast, the other ranks' rows and their gradient.
    rows = 2 * 63 * settings.batch * 2 * config.model.embedding * 4 / 2**30
    assert one.memory_gib - many.memory_gib == pytest.approx(saved - rows)


@pytest.mark.parametrize("name", ["vit_l", "vit_h"])
def test_they_step_at_zero_3_on_two_ranks(name, tmp_path):
    """At their width, patch and heads; one layer, and clips of 4 x 4 patches."""
    if os.environ.get("MILES_FAST_FAULTS") != "full":
        pytest.skip("make faults runs it")
    write_data(tmp_path)
    ds = json.loads((LAUNCH / "ds" / "zero3.json").read_text()) | {"train_micro_batch_size_per_gpu": 2}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    tree = tiny_tree(tmp_path)
    size = 4 * load_config(LAUNCH / "configs" / f"{name}.yaml").model.video.patch_size
    keys = [
        *(f"run.folder={tmp_path}/run", "run.steps=2", "run.log_every=1", "run.compile=false"),
        *(f"data.train={json.dumps(tree['data']['train'])}", "data.threads=1", "data.decode_workers=1"),
        *("model.video.weights=null", "model.video.depth=1", f"model.video.image_size={size}"),
        f"model.text={json.dumps(tree['model']['text'] | {'max_positions': 32})}",
    ]
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    files = ("--config", str(LAUNCH / "configs" / f"{name}.yaml"), "--ds_config", str(tmp_path / "ds.json"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    run = subprocess.run(
        [*command, str(LAUNCH / "pretrain.py"), *files, *keys],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [record["loss"] for record in read_log(tmp_path / "run") if "loss" in record]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]
