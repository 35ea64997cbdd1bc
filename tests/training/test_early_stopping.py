"""Early stopping: what is kept, when it ends, and that a resumed run goes on with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import ds_tree, tiny_config, write_data

from miles_fast.config import ConfigError
from miles_fast.training import loop
from miles_fast.training.checkpoint import find_checkpoint
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.early_stopping import EarlyStopping, r_sum
from miles_fast.training.loop import pretrain
from miles_fast.training.manifest import CheckpointError
from miles_fast.training.progress import read_log


def result(value):
    row = {"r1": value, "r5": 0.0, "r10": 0.0}
    return {"heldout": {"text_to_video": row, "video_to_text": row}}


def test_the_sum_of_both_directions():
    row = {"r1": 0.1, "r5": 0.2, "r10": 0.4, "median_rank": 7}
    assert r_sum({"text_to_video": row, "video_to_text": {**row, "r1": 0.2}}) == pytest.approx(1.5)


def test_verdicts(tmp_path):
    stopping = EarlyStopping(tmp_path, "heldout", patience=2, evaluate_every=10)
    values = {10: 0.2, 20: 0.4, 30: 0.4, 40: 0.3}
    verdicts = {step: stopping.judge(step, result(value)) for step, value in values.items()}
    assert [v.improved for v in verdicts.values()] == [True, True, False, False]  # a tie is no better
    assert [v.stop for v in verdicts.values()] == [False, False, False, True]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    write_data(place)
    return place


def train(root, folder, values, steps=12, resume=None, init_from=None, on_save_error="stop"):
    """A tiny run whose evaluations, of its start and every 2 steps, are these, one after the other."""
    left = iter(values)
    run = {"folder": str(folder), "steps": steps, "evaluate_every": 2, "patience": 2, "save_every": 2}
    run |= {"keep_checkpoints": 9, "init_from": init_from, "on_save_error": on_save_error}
    config = tiny_config(root, run=run, method={"view": "none"}, model={"attention": "sdpa"})
    settings = check_ds_config(ds_tree(), "ds.json", config, cuda=False, ranks=1)
    pretrain(config, settings, resume=resume, evaluate=lambda model, device: result(next(left)))
    return [record["step"] for record in read_log(Path(folder)) if "evaluation" in record]


def best(folder):
    return json.loads((folder / "best" / "best.json").read_text())


def test_the_best_checkpoint_is_kept_and_the_run_ends(root, tmp_path):
    folder = tmp_path / "run"
    assert train(root, folder, [0.2, 0.1, 0.5, 0.3, 0.2, 0.9]) == [0, 2, 4, 6, 8]  # 0.9 is never reached
    assert best(folder)["step"] == 4 and best(folder)["r_sum"] == 1.0
    kept = load_file(folder / "best" / "model.safetensors")
    at_best = load_file(folder / "checkpoints" / "step-00000004" / "student" / "model.safetensors")
    last = load_file(folder / "checkpoints" / "step-00000008" / "student" / "model.safetensors")
    assert all(torch.equal(kept[name], at_best[name]) for name in at_best)
    assert any(not torch.equal(kept[name], last[name]) for name in last)


def test_a_resumed_run_remembers_the_best(root, tmp_path):
    folder = tmp_path / "run"
    train(root, folder, [0.1, 0.5, 0.3], steps=4)
    assert train(root, folder, [0.4, 0.9], resume="auto") == [0, 2, 4, 6]  # two without a better one: over
    assert best(folder)["step"] == 2


def test_a_run_that_gets_no_better_than_its_start_keeps_the_start(root, tmp_path):
    train(root, tmp_path / "first", [0.1, 0.2], steps=2)
    start = load_file(tmp_path / "first" / "best" / "model.safetensors")
    folder = tmp_path / "run"
    assert train(root, folder, [0.5, 0.4, 0.3], init_from=str(tmp_path / "first")) == [0, 2, 4]
    assert best(folder)["step"] == 0
    kept = load_file(folder / "best" / "model.safetensors")
    assert kept.keys() == start.keys() and all(torch.equal(kept[name], start[name]) for name in start)


def test_a_run_resumed_from_its_start_trains_on_and_does_not_judge_it_again(root, tmp_path):
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "step-00000002" / "student" / "model.safetensors"
    train(root, folder, [0.1, 0.2], steps=2)
    once = load_file(last)
    resume = str(folder / "checkpoints" / "step-00000000")
    assert train(root, folder, [0.2], steps=2, resume=resume) == [0, 2]
    again = load_file(last)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_best_model_that_cannot_be_written_ends_the_run_only_where_it_is_to(root, tmp_path, monkeypatch):
    write, folder = loop.Saver._write, tmp_path / "run"

    def fail_at(step):
        def refuse(saver, name, *rest):
            if name == f"step-{step:08d}":
                raise OSError(28, "No space left on device")
            write(saver, name, *rest)

        monkeypatch.setattr(loop.Saver, "_write", refuse)

    fail_at(0)
    with pytest.raises(CheckpointError, match="step-00000000 could not be written.*No space left"):
        train(root, folder, [0.5])
    # What is worse than the start, which is still where it came from, does not become the best.
    train(root, folder, [0.5, 0.4], steps=2, on_save_error="continue")
    assert not (folder / "best").exists()
    fail_at(4)
    train(root, folder, [0.1, 0.2, 0.5, 0.3], steps=6, on_save_error="continue")
    assert best(folder)["step"] == 6


def test_an_evaluation_that_fails_leaves_what_was_trained(root, tmp_path):
    """The checkpoint of step 4, no better than step 2's, may still be being written."""
    values = [0.1, 0.2, 0.1]
    train(root, tmp_path / "whole", [*values, 0.0])
    with pytest.raises(StopIteration):  # where there are no more values
        train(root, tmp_path / "run", values)
    for name in ("rank-00000.safetensors", "student/model.safetensors"):
        files = [tmp_path / run / "checkpoints" / "step-00000006" / name for run in ("run", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert find_checkpoint(tmp_path / "run", "auto").name == "step-00000006"
    assert best(tmp_path / "run")["step"] == 2


def test_an_evaluation_that_fails_raises_its_own_error_where_nothing_can_be_saved(
    root, tmp_path, monkeypatch, caplog
):
    def full(*rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.Saver, "_write", full)
    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 1})
    settings = check_ds_config(ds_tree(), "ds.json", config, cuda=False, ranks=1)
    with pytest.raises(ZeroDivisionError):
        pretrain(config, settings, evaluate=lambda model, device: 1 / 0)
    assert "failed, and nothing was saved" in caplog.text and "No space left" in caplog.text


def test_patience_without_evaluations_is_refused(root):
    with pytest.raises(ConfigError, match="run.patience = 3 needs run.evaluate_every and a set"):
        tiny_config(root, run={"folder": "x", "steps": 4, "patience": 3})


@pytest.mark.parametrize(
    "name,stage,message", [("video.", 0, "begins with 'video.'"), ("vid_proj.", 3, "stage = 3 .*run.freeze")]
)
def test_what_cannot_be_frozen_is_refused(root, tmp_path, name, stage, message):
    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "freeze": [name]})
    with pytest.raises(ValueError, match=message):
        pretrain(config, check_ds_config(ds_tree(stage=stage), "ds.json", config, cuda=False, ranks=1))
