"""Whole tiny runs: resume, views, sources, checkpoints, export, and refusals."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FLOAT32_SUMS, ds_tree, tiny_config, write_data, write_frames

import miles_fast
from miles_fast.config import ConfigError
from miles_fast.export.run import export_run
from miles_fast.training import loop, saving
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.engine import init_process_group, launched_ranks
from miles_fast.training.loop import pretrain
from miles_fast.training.manifest import CheckpointError
from miles_fast.training.progress import read_log


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    write_data(place)
    return place


def train(config, resume=None, evaluate=None, **ds):
    tree = ds_tree(**ds)
    if ds.get("bf16") and ds.get("stage") == 1:
        tree |= FLOAT32_SUMS
    settings = check_ds_config(tree, "ds.json", config, cuda=False, ranks=1)
    pretrain(config, settings, resume=resume, evaluate=evaluate)
    return read_log(Path(config.run.folder))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors"), load_file(folder / "snapshot.safetensors")


FROZEN = ("video_model.blocks.0.", "text_model.")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("stage", "freeze"), [*((s, ()) for s in range(4)), *((s, FROZEN) for s in range(3))]
)
def test_six_steps_equal_three_resumed_bitwise(root, tmp_path, stage, freeze, bf16):
    keys = {"save_every": 3, "freeze": list(freeze)}
    whole = tiny_config(root, run={"folder": str(tmp_path / "whole"), **keys})
    first = train(whole, stage=stage, bf16=bf16)
    parted = tiny_config(root, run={"folder": str(tmp_path / "parted"), **keys})
    folder = tmp_path / "parted" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000003", folder / "step-00000003")
    (folder / "latest").write_text("step-00000003\n")
    second = train(parted, resume="auto", stage=stage, bf16=bf16)
    figures = ("step", "loss", "contrastive", "regression", "target_cosine", "learning_rate")
    assert [[r[f] for f in figures] for r in second] == [[r[f] for f in figures] for r in first[3:]]
    for one, two in zip(
        weights(tmp_path / "whole" / "checkpoints" / "step-00000006"),
        weights(folder / "step-00000006"),
        strict=True,
    ):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_bf16_run_goes_on_at_another_stage_with_the_same_loss(root, tmp_path):
    model = tiny_config(root).model
    tree = {"text": {**vars(model.text), "dropout": 0.0}, "video": vars(model.video), "embedding": 16}
    losses = {}
    for name, stage, resume in (("whole", 1, None), *((f"at {s}", s, "auto") for s in (0, 2, 3))):
        run = {"folder": str(tmp_path / name), "steps": 4, "save_every": 3}
        if resume:
            shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / name / "checkpoints")
            (tmp_path / name / "checkpoints" / "latest").write_text("step-00000003\n")
        log = train(tiny_config(root, run=run, model=tree), resume=resume, stage=stage, bf16=True)
        losses[name] = log[-1]["loss"]
    # The CPU's bf16 products differ in the last bit with where in memory a weight lies.
    np.testing.assert_allclose(list(losses.values()), losses["whole"], rtol=1e-3)


@pytest.mark.parametrize("view", ["A", "B", "D", "D full", "none"])
def test_views_train_and_the_log_holds_the_figures(root, tmp_path, view):
    method = {"view": view[:4].split()[0], "predictor": {"width": 16, "depth": 1, "heads": 2}}
    method["contrast"] = {"clip": "full" if view == "D full" else "visible"}
    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 4}, method=method)
    log = train(config, stage=1)
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    phases = log[0]["start_phases"]
    assert {"building the engine", "computing step 1"} <= phases.keys() and min(phases.values()) >= 0
    assert 0 < sum(phases.values()) < log[0]["start_seconds"] and "start_phases" not in log[1]
    for record in log:
        assert np.isfinite([record[k] for k in ("loss", "gradient_norm", "clips_per_second")]).all()
        if view == "none":
            assert record["regression"] == 0 and record["loss"] == record["contrastive"]
        else:
            np.testing.assert_allclose(
                record["loss"], record["contrastive"] + record["regression"], rtol=1e-6
            )
            np.testing.assert_allclose(record["target_cosine"], 1 - record["regression"] / 2, atol=1e-5)
            assert record["target_std"] > 0.1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_logged_gradient_norm_is_the_same_at_every_stage(root, tmp_path, accumulation):
    norms = []
    for stage in (0, 1):
        config = tiny_config(root, run={"folder": str(tmp_path / str(stage)), "steps": 3})
        log = train(config, stage=stage, batch=4 // accumulation, accumulation=accumulation)
        norms.append([record["gradient_norm"] for record in log])
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_accumulation_takes_the_same_samples(root, tmp_path):
    log = train(tiny_config(root, run={"folder": str(tmp_path / "r"), "steps": 2}), batch=2, accumulation=2)
    assert len(log) == 2 and all(np.isfinite(r["loss"]) for r in log)


def test_stages_chain_and_sources_alternate(root, tmp_path):
    write_frames(tmp_path / "images", 8, shards=1, frames=1)
    data = tiny_config(root).data
    sources = [
        {"shards": [str(tmp_path / "images" / "*.tar")], "name": "images"},
        *[vars(s) for s in data.train],
    ]
    tree = {
        "train": [{"shards": s["shards"], "name": s["name"]} for s in sources],
        "frames_per_clip": 1,
        "caption_tokens": 8,
    }
    first = tiny_config(root, run={"folder": str(tmp_path / "one"), "steps": 2, "save_every": 2}, data=tree)
    train(first)
    second = tiny_config(
        root,
        run={
            "folder": str(tmp_path / "two"),
            "steps": 1,
            "init_from": str(tmp_path / "one"),
            "save_every": 1,
        },
    )
    settings = check_ds_config(ds_tree(), "ds.json", second, cuda=False, ranks=1)
    settings.tree["optimizer"]["params"]["lr"] = 0.0
    pretrain(second, settings)
    one = weights(tmp_path / "one" / "checkpoints" / "step-00000002")[0]
    two = weights(tmp_path / "two" / "checkpoints" / "step-00000001")[0]
    assert one.keys() == two.keys() and "pretraining.mask_token" in one
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_stays_of_a_run_that_ended(root, tmp_path, monkeypatch, stage):
    alive = []

    def build_engine(*arguments):
        engine = build(*arguments)
        alive.extend(weakref.ref(one) for one in (engine, engine.module, engine.module.model))
        return engine

    build = loop.build_engine
    monkeypatch.setattr(loop, "build_engine", build_engine)
    train(tiny_config(root, run={"folder": str(tmp_path), "steps": 1}), stage=stage)
    gc.collect()
    assert alive and not any(one() for one in alive)


def test_export_loads_and_gives_the_same_embeddings(root, tmp_path):
    from miles_fast.data.clips import ClipDraw, read_clip
    from miles_fast.data.loader import EvaluationLoader
    from miles_fast.data.shards import ShardSet
    from miles_fast.evaluation.retrieval import evaluate_retrieval
    from miles_fast.models.text_encoder import load_tokenizer

    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 3})
    seen = []

    def evaluate(model, device):
        tokenizer = load_tokenizer(config.model.text.tokenizer_source)
        source = config.data.evaluation[0]
        loader = EvaluationLoader(
            source, config.data, image_size=32, tokenizer=tokenizer, batch=4, device=device
        )
        result = evaluate_retrieval(model, loader)
        seen.append((result, model.embed_video(torch.ones(1, 2, 3, 32, 32)).detach()))
        return {"r1": result.text_to_video.r1}

    log = train(config, evaluate=evaluate, stage=1)
    assert log[-1]["evaluation"]["r1"] == seen[0][0].text_to_video.r1 and seen[0][0].gallery == 10
    export_run(tmp_path / "run", tmp_path / "export")
    assert {p.name for p in (tmp_path / "export").iterdir()} == {
        "model.safetensors",
        "model.json",
        "tokenizer",
    }
    model = miles_fast.load(tmp_path / "export")
    torch.testing.assert_close(model.embed_video(torch.ones(1, 2, 3, 32, 32)), seen[0][1], atol=0, rtol=0)
    names = set(model.state_dict())
    assert not [n for n in names if "mask_token" in n or "head" in n]
    assert {"vid_proj.0.weight", "text_proj.1.bias", "video_model.blocks.1.timeattn.qkv.weight"} <= names
    again = read_clip(
        ShardSet([root / "heldout" / "00000.tar"]), 0, ClipDraw(num_frames=2, takes="jpeg"), None
    )
    text = model.encode_text([again.caption])
    np.testing.assert_allclose(text.norm(dim=-1).detach(), 1, atol=1e-6)


def test_an_earlier_run_is_moved_aside(root, tmp_path):
    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 1})
    train(config)
    train(config)
    assert (tmp_path / "run.old-1" / "checkpoints" / "latest").exists()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(config, resume="auto")  # from the start: there is nothing to go on from
    assert read_log(tmp_path / "run.old-2")
    train(config, resume=str(tmp_path / "run.old-1"))  # a run from elsewhere takes no other one's place
    assert (tmp_path / "run.old-3" / "checkpoints" / "latest").exists()


def test_a_start_that_fails_leaves_the_folder_as_it_was(root, tmp_path):
    run = {"folder": str(tmp_path / "run"), "steps": 1}
    misfits = [
        tiny_config(root, run=run | {"init_from": str(tmp_path / "nowhere")}),
        tiny_config(root, run=run | {"freeze": ["nothing."]}),
        tiny_config(root, run=run, data={"train": [{"shards": [str(tmp_path / "*.tar")]}]}),
    ]
    for before in ([], ["checkpoints", "config.json", "log.jsonl", "notes.txt"]):
        for config in misfits:
            with pytest.raises(ValueError):
                train(config)
            assert [path.name for path in tmp_path.iterdir()] == ["run"]
            names = {path.name for path in tmp_path.glob("run/*")}
            assert names >= set(before) and ("config.json" in names) == bool(before)
        train(tiny_config(root, run=run))
        (tmp_path / "run" / "notes.txt").touch()
    assert (tmp_path / "run.old-1" / "checkpoints" / "latest").exists()
    # The run that it starts from may be the one in its folder.
    train(tiny_config(root, run=run | {"init_from": run["folder"]}))
    assert (tmp_path / "run.old-2" / "checkpoints" / "latest").exists()


def test_no_run_takes_the_folder_of_a_model_or_moves_its_own_tokenizer(root, tmp_path):
    run = {"folder": str(tmp_path / "run"), "steps": 1}
    train(tiny_config(root, run=run))
    export_run(tmp_path / "run", tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(ValueError, match="model holds a model; name another folder"):
        train(tiny_config(root, run=run | {"folder": str(tmp_path / "model")}))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    config = tiny_config(root, run=run)
    inside = tmp_path / "run" / "checkpoints" / "step-00000001" / "student" / "tokenizer"
    text = {**vars(config.model.text), "tokenizer": str(inside)}
    model = {"text": text, "video": vars(config.model.video), "embedding": 16}
    with pytest.raises(ValueError, match="tokenizer lies in run.folder.*would be moved aside"):
        train(tiny_config(root, run=run, model=model))
    assert inside.is_dir()


def test_a_folder_that_takes_no_run_is_refused_before_the_model_is_built(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delattr(loop, "build_models")
    with pytest.raises(ValueError, match=r"run.folder = .*file/run: a run cannot be kept there"):
        train(tiny_config(root, run={"folder": str(tmp_path / "file" / "run"), "steps": 1}))
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_that_another_run_writes_to_is_refused(root, tmp_path, resume):
    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 1})
    train(config)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    # Of its own process: one process may lock a file twice.
    holds = "import sys; from pathlib import Path; from miles_fast.training.start import FolderLock; "
    holds += "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holds, str(tmp_path / "run")], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="run: another run is writing there; name another folder"):
            train(config, resume=resume)
        assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        other.kill()
    train(config, resume=resume)


def test_a_resume_says_what_was_set_otherwise(root, tmp_path, caplog):
    caplog.set_level("INFO", "miles_fast")
    run = {"folder": str(tmp_path / "run"), "steps": 1, "seed": 0}
    train(tiny_config(root, run=run))
    train(tiny_config(root, run=run), resume="auto")
    assert "other settings" not in caplog.text
    train(tiny_config(root, run=run | {"steps": 2, "seed": 9}, data={"flip": 0.25}), resume="auto")
    assert (
        "step-00000001 was made with other settings: data.flip: 0.5 -> 0.25; run.seed: 0 -> 9" in caplog.text
    )


def test_another_architecture_is_refused_with_the_difference(root, tmp_path):
    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 1})
    train(config)
    tree = {
        "video": {**vars(config.model.video), "depth": 1},
        "text": vars(config.model.text),
        "embedding": 16,
    }
    with pytest.raises(CheckpointError, match="model.video.depth: 2 -> 1"):
        train(tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 2}, model=tree), resume="auto")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        train(config, resume=str(tmp_path / "nowhere"))


def test_a_full_disk_leaves_the_older_checkpoint(root, tmp_path, monkeypatch):
    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 4, "save_every": 2})
    write = saving.Saver._write

    def full(saver, name, *rest):
        if name == "step-00000004":
            saver._partial.mkdir()
            (saver._partial / "half").write_bytes(b"0" * 100)
            raise OSError(28, "No space left on device")
        write(saver, name, *rest)

    monkeypatch.setattr(saving.Saver, "_write", full)
    with pytest.raises(CheckpointError, match="No space left.*older checkpoints are untouched"):
        train(config)
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000002\n"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many KiB; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kib):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small file system cannot be mounted: {error}")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


def test_a_disk_that_really_fills_up_keeps_the_older_checkpoint(root, tmp_path, small_disk):
    train(tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 2, "save_every": 2}))
    whole = tmp_path / "run" / "checkpoints" / "step-00000002"
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    disk = small_disk(int(1.6 * size / 1024))
    config = tiny_config(root, run={"folder": str(disk / "run"), "steps": 4, "save_every": 2})
    with pytest.raises(CheckpointError, match="older checkpoints are untouched.*--resume auto"):
        train(config)
    folder = disk / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002"]
    subprocess.run(["mount", "-o", f"remount,size={4 * size // 1024}k", str(disk)], check=True)
    resumed = train(config, resume="auto")
    assert [record["step"] for record in resumed] == [1, 2, 3, 4]


def test_another_optimizer_or_schedule_is_refused_on_resume(root, tmp_path):
    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 2, "save_every": 1})

    def resume(**keys):
        pretrain(
            config, check_ds_config(ds_tree() | keys, "ds.json", config, cuda=False, ranks=1), resume="auto"
        )

    pretrain(config, check_ds_config(ds_tree(), "ds.json", config, cuda=False, ranks=1))
    with pytest.raises(CheckpointError, match="the optimizer of DeepSpeed's json was adam and is sgd"):
        resume(optimizer={"type": "SGD", "params": {"lr": 0.1}})
    with pytest.raises(CheckpointError, match="the scheduler .* was None and is WarmupLR"):
        resume(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 2}})


def test_ds_json_that_contradicts_is_refused(root):
    config = tiny_config(root)
    tree = ds_tree() | {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}}
    with pytest.raises(ConfigError, match="total_num_steps = 9, but run.steps = 6"):
        check_ds_config(tree, "ds.json", config, cuda=False, ranks=1)
    with pytest.raises(ConfigError, match="train_batch_size = 5"):
        check_ds_config(ds_tree() | {"train_batch_size": 5}, "ds.json", config, cuda=False, ranks=1)
    with pytest.raises(ConfigError, match="fp16"):
        check_ds_config(ds_tree() | {"fp16": {"enabled": True}}, "ds.json", config, cuda=False, ranks=1)
    with pytest.raises(ConfigError, match="train_micro_batch_size_per_gpu"):
        check_ds_config(json.loads("{}"), "ds.json", config, cuda=False, ranks=1)
    with pytest.raises(ConfigError, match="check_grad_overflow = false lets gradients that are not finite"):
        unchecked = ds_tree() | {"bf16": {"enabled": True, "check_grad_overflow": False}}
        check_ds_config(unchecked, "ds.json", config, cuda=False, ranks=1)
    tree = ds_tree(stage=3)
    tree["zero_optimization"]["stage3_module_granularity_threshold"] = 1
    with pytest.raises(ConfigError, match="stage3_module_granularity_threshold has .* take it out"):
        check_ds_config(tree, "ds.json", config, cuda=False, ranks=1)


def test_ranks_that_srun_started_know_which_they_are(monkeypatch):
    init_process_group()  # of this process alone; what follows only names it
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "MASTER_ADDR": "node-0"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert launched_ranks() == 16  # before they meet: DeepSpeed's json is checked with it
    init_process_group()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "16", "1"]
