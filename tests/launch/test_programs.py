"""The programs as people call them: the launcher's line to a model folder, and errors without tracebacks."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fork_server import LAUNCHERS, PATHS, ROOT, free_port, run
from safetensors.torch import load_file
from tiny import ds_tree, tiny_tree, write_data

from launch import embed, evaluate, prepare, report, search
from miles_fast.config_tree import parse_config
from miles_fast.export.pretrained import read_pretrained
from miles_fast.export.run import write_pretrained
from miles_fast.models.dual_encoder import build_dual_encoder
from miles_fast.models.storage import write_model
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training.checkpoint import find_checkpoint, model_folder
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.engine import build_engine, init_process_group
from miles_fast.training.manifest import MANIFEST
from miles_fast.training.objective import Objective
from miles_fast.training.saving import Saver


def call(*command, check=True):
    done = run(*command)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("programs")
    write_data(root)
    (root / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree(root)))
    (root / "ds.json").write_text(json.dumps(ds_tree(stage=1)))
    return root


def test_train_export_and_evaluate(experiment):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": PATHS, "PATH": path}
    for name in LAUNCHERS:
        environment.pop(name, None)
    launcher = ("deepspeed", "--num_gpus", "1", "--master_port", str(free_port()), "launch/pretrain.py")
    files = ("--ds_config", str(experiment / "ds.json"), "--config", str(experiment / "tiny.yaml"))
    command = (*launcher, *files, "run.steps=2", "run.save_every=2")
    launched = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert (experiment / "run" / "checkpoints" / "latest").read_text() == "step-00000002\n"
    exported = experiment / "exported"
    call("launch/export.py", str(experiment / "run"), "--output", str(exported))
    run = call("launch/report.py", str(experiment / "run"), "--maps", "1")
    assert "report.html: 0." in run.stdout and (experiment / "run" / "report.html").is_file()
    assert (exported / "model.safetensors").is_file()
    shards = str(experiment / "heldout" / "*.tar")
    run = call(
        *("launch/evaluate.py", str(exported), "--shards", shards, "--frames", "2"),
        *("--caption-tokens", "8", "--json", str(experiment / "metrics.json")),
    )
    assert "text to video" in run.stdout and "chance" in run.stdout
    assert json.loads((experiment / "metrics.json").read_text())["gallery"] == 10


def test_finetune_a_model_and_evaluate_its_best_by_a_protocol(experiment, tmp_path):
    start = experiment / "started"
    tree = tiny_tree(experiment)
    fresh = build_dual_encoder(
        parse_config(tree, "tiny").model, len(load_tokenizer(experiment / "tokenizer"))
    )
    write_model(start, fresh.state_dict(), fresh.config, fresh.vocabulary_size, str(experiment / "tokenizer"))
    run = {"folder": str(tmp_path / "run"), "steps": 4, "evaluate_every": 2, "patience": 3}
    tree |= {"run": run, "method": {"view": "none"}}
    del tree["model"]
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(tree))
    finetune = ("launch/finetune.py", "--ds_config", str(experiment / "ds.json"))
    finetune += ("--config", str(tmp_path / "finetune.yaml"))
    call(*finetune, "--model", str(start), "run.freeze=[video_model.patch_embed]", "model.attention=sdpa")
    best = tmp_path / "run" / "best"
    assert json.loads((best / "best.json").read_text())["step"] in (0, 2, 4)
    before, after = (load_file(f / "model.safetensors") for f in (start, model_folder(tmp_path / "run")))
    assert torch.equal(*(w["video_model.patch_embed.proj.weight"] for w in (before, after)))
    assert not torch.equal(*(w["video_model.blocks.0.attn.qkv.weight"] for w in (before, after)))

    error = call(*finetune, "--model", str(start), "method.view=A", check=False).stderr
    assert "method.view = A: fine-tuning contrasts full clips" in error and "Traceback" not in error

    data = tmp_path / "data"
    data.mkdir()
    (data / "1.mp4").write_bytes(grey_video())
    (data / "2.mp4").write_bytes(b"cut off")
    lines = [
        {"clip_name": f"{n}.mp4", "options": ["a dog moves", "a cat moves"], "answer": 0} for n in (1, 2)
    ]
    (data / "ssv2_mc_val.jsonl").write_text("\n".join(map(json.dumps, lines)))
    protocol = ("launch/evaluate.py", str(best), "--protocol", "ssv2_mc", "--data", str(data))
    result = tmp_path / "result.json"
    shown = call(*protocol, "--no-cache", "--workers", "1", "--json", str(result)).stdout
    assert "ssv2_mc, 1 videos" in shown and "1 videos cannot be read and are not scored" in shown
    assert json.loads(result.read_text())["chance"] == {"top-1": 0.5}


@pytest.fixture(scope="module")
def elsewhere(experiment):
    """The same model as a Hugging Face folder and as Frozen's .pth, which holds no tokenizer."""
    tokenizer = experiment / "tokenizer"
    model = build_dual_encoder(
        parse_config(tiny_tree(experiment), "tiny").model, len(load_tokenizer(tokenizer))
    )
    write_model(experiment / "ours", model.state_dict(), model.config, model.vocabulary_size, str(tokenizer))
    found = read_pretrained(experiment / "ours")
    return [
        write_pretrained(found, kind, experiment / name)[0]
        for kind, name in (("hf", "hf"), ("frozen", "f.pth"))
    ]


def test_foreign_models_are_measured_embedded_searched_and_shown(experiment, elsewhere, monkeypatch, capsys):
    def program(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    folder, file = elsewhere
    shards = ("--shards", experiment / "heldout" / "*.tar")
    tokenizer = ("--tokenizer", experiment / "tokenizer")
    short = ("--frames", "2", "--caption-tokens", "8")
    measured = [
        program(evaluate, experiment / "ours", *shards, *short),
        program(evaluate, folder, *shards, *short),
        program(evaluate, file, *tokenizer, *shards, *short),
    ]
    assert "gallery 10" in measured[0] and measured[0] == measured[1] == measured[2]
    index = experiment / "embedded"
    shown = program(embed, file, *tokenizer, *shards, "--output", index, "--workers", "1")
    assert "10 clips" in shown and "unreadable: none" in shown
    answers = [
        program(search, "a red dog moves", "--index", index, "--json", "--model", model, *more)
        for model, more in ((file, tokenizer), (folder, ()))
    ]
    assert answers[0] == answers[1] and len(json.loads(answers[0])["clips"]) == 5
    page = experiment / "page.html"
    program(report, folder, *shards, "--output", page, "--maps", "1")
    text = page.read_text()
    assert "There is no log of a run" in text and "10 clips of gallery" in text and "image_size: 32" in text
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    with pytest.raises(ValueError, match="no log.jsonl there.*--output"):
        report.main()


def test_finetuning_starts_from_a_foreign_file(experiment, elsewhere, tmp_path):
    tree = tiny_tree(experiment) | {"method": {"view": "none"}}
    del tree["model"]
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    call(
        *("launch/finetune.py", "--ds_config", str(experiment / "ds.json")),
        *("--config", str(tmp_path / "finetune.yaml"), "--model", str(elsewhere[1])),
        *("--tokenizer", str(experiment / "tokenizer"), f"run.folder={run}", "run.steps=1"),
        *("run.freeze=[text_model,video_model]", "model.attention=sdpa"),
    )
    before, after = read_pretrained(experiment / "ours"), read_pretrained(run)
    changed = {name for name, t in before.weights.items() if not torch.equal(t, after.weights[name])}
    assert {name.rsplit(".", 1)[0] for name in changed} == {"vid_proj.0", "text_proj.1"}
    assert read_pretrained(tmp_path / "run.start").config.video == before.config.video


def test_deepspeeds_pickles_are_loaded_with_the_flag_only(experiment, tmp_path):
    tree = tiny_tree(experiment)
    tree |= {"run": tree["run"] | {"folder": str(tmp_path / "run"), "steps": 2}, "method": {"view": "none"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    config = parse_config(tree, "tiny")
    init_process_group()
    settings = check_ds_config(ds_tree(stage=1), "ds", config, cuda=torch.cuda.is_available(), ranks=1)
    model = build_dual_encoder(config.model, len(load_tokenizer(experiment / "tokenizer")))
    engine = build_engine(Objective(model, config.method, config.data.frames_per_clip), settings)
    saver = Saver(tmp_path / "run", config, engine, None, engine.device)
    saver.start(1, [])
    saver.settle()
    checkpoint = find_checkpoint(tmp_path / "run", "auto")
    for ours in (*checkpoint.glob("rank-*"), checkpoint / MANIFEST):
        ours.unlink()
    engine.save_checkpoint(str(checkpoint), tag="engine", save_latest=False)
    files = ("--ds_config", str(experiment / "ds.json"), "--config", str(tmp_path / "tiny.yaml"))
    resume = ("launch/pretrain.py", *files, "--resume", "auto")
    refused = call(*resume, check=False)
    assert refused.returncode == 1 and "add --trust-checkpoint" in refused.stderr
    assert "a pickle can run any code" in refused.stderr and "Traceback" not in refused.stderr
    assert f"resumed from {checkpoint} at step 1" in call(*resume, "--trust-checkpoint").stderr
    assert find_checkpoint(tmp_path / "run", "auto").name == "step-00000002"


def grey_video():
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(5):
            picture = np.full((48, 64, 3), 50 * level, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "command,message",
    [
        (
            ("launch/finetune.py", "--ds_config", "ds.json", "--config", "launch/configs/finetune_msvd.yaml"),
            "key 'model' is missing; name the model to start from with --model",
        ),
        (("launch/pretrain.py", "--ds_config", "ds.json", "run.stepz=3"), "did you mean 'steps'?"),
        (("launch/pretrain.py", "--ds_config", "nowhere.json"), "nowhere.json: cannot be read"),
        (("launch/export.py", "nowhere", "--output", "x"), "nowhere: no checkpoint there"),
        (("launch/export.py", "no.pth", "--output", "x", "--from", "official"), "no.pth: no such file"),
        (("launch/embed.py", "nowhere", "--shards", "x", "--output", "y"), "nowhere: no checkpoint there"),
        (("launch/search.py", "a dog", "--index", "nowhere"), "nowhere/set.json: cannot be read"),
        (("launch/report.py", "nowhere"), "nowhere: no log.jsonl there"),
        (("launch/evaluate.py", "nowhere", "--shards", "x"), "nowhere: no checkpoint there"),
        (("launch/prepare.py", "nowhere-*.tar", "--output", "x"), "nowhere-*.tar"),
        (
            ("launch/finetune.py", "--ds_config", "d", "--config", "c", "--tokenizer", "x"),
            "--tokenizer goes with --model",
        ),
    ],
)
def test_mistakes_are_one_line_not_a_traceback(command, message):
    run = call(*command, check=False)
    assert run.returncode == 1
    assert message in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "command,option,why",
    [
        ("evaluate.py m --shards x --dual-softmax", "--dual-softmax", "with --shards"),
        ("evaluate.py m --shards x --probe --part train", "--probe", "with --shards"),
        ("evaluate.py m --protocol didemo --data d --allow http://a/", "--allow", "with --protocol"),
        ("prepare.py x --output y --max-frames 3", "--max-frames", "without --fps"),
        ("prepare.py x --output y --remux --gop 3", "--gop", "without --transcode"),
        ("prepare.py x --output y.html --look --limit 3", "--limit", "with --look"),
    ],
)
def test_options_that_would_do_nothing_are_refused(monkeypatch, capsys, command, option, why):
    program, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit):
        {"evaluate.py": evaluate, "prepare.py": prepare}[program].main()
    assert f"{option} does nothing {why}" in capsys.readouterr().err
