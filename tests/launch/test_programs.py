"""The programs as people call them: the launcher's line to a model folder, and errors without tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ds_tree, tiny_tree, write_data

ROOT = Path(__file__).parents[2]


def call(*command, check=True):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # an engine test in this process may have set them
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert not check or run.returncode == 0, run.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("programs")
    write_data(root)
    (root / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree(root)))
    (root / "ds.json").write_text(json.dumps(ds_tree(stage=1)))
    return root


def test_train_export_and_evaluate(experiment):
    launcher = ("deepspeed", "--num_gpus", "1", "--master_port", "29611", "launch/pretrain.py")
    files = ("--ds_config", str(experiment / "ds.json"), "--config", str(experiment / "tiny.yaml"))
    call(*launcher, *files, "run.steps=2", "run.save_every=2")
    assert (experiment / "run" / "checkpoints" / "latest").read_text() == "step-00000002\n"
    exported = experiment / "exported"
    call(sys.executable, "launch/export.py", str(experiment / "run"), "--output", str(exported))
    run = call(sys.executable, "launch/report.py", str(experiment / "run"), "--maps", "1")
    assert "report.html: 0." in run.stdout and (experiment / "run" / "report.html").is_file()
    assert (exported / "model.safetensors").is_file()
    shards = str(experiment / "heldout" / "*.tar")
    run = call(
        *(sys.executable, "launch/evaluate.py", str(exported), "--shards", shards, "--frames", "2"),
        *("--caption-tokens", "8", "--json", str(experiment / "metrics.json")),
    )
    assert "text to video" in run.stdout and "chance" in run.stdout
    assert json.loads((experiment / "metrics.json").read_text())["gallery"] == 10


@pytest.mark.parametrize(
    "command,message",
    [
        (("launch/pretrain.py", "--ds_config", "ds.json", "run.stepz=3"), "did you mean 'steps'?"),
        (("launch/pretrain.py", "--ds_config", "nowhere.json"), "nowhere.json: cannot be read"),
        (("launch/export.py", "nowhere", "--output", "x"), "nowhere: no checkpoint there"),
        (("launch/export.py", "no.pth", "--output", "x", "--from", "official"), "no.pth: no such file"),
        (("launch/embed.py", "nowhere", "--shards", "x", "--output", "y"), "nowhere: no checkpoint there"),
        (("launch/search.py", "a dog", "--index", "nowhere"), "nowhere/set.json: cannot be read"),
        (("launch/report.py", "nowhere"), "nowhere: no config.json there"),
        (("launch/evaluate.py", "nowhere", "--shards", "x"), "nowhere: no checkpoint there"),
        (("launch/prepare.py", "nowhere-*.tar", "--output", "x"), "nowhere-*.tar"),
    ],
)
def test_mistakes_are_one_line_not_a_traceback(command, message):
    run = call(sys.executable, *command, check=False)
    assert run.returncode == 1
    assert message in run.stderr and "Traceback" not in run.stderr
