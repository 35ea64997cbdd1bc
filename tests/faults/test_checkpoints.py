"""F1, F8, F10, F12: checkpoints that are killed, cannot be written, are malicious or damaged."""

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import ds_tree, tiny_config

from miles_fast.export.run import export_run
from miles_fast.models.dual_encoder import build_dual_encoder
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training import saving
from miles_fast.training.checkpoint import find_checkpoint, read_state, restore_checkpoint
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.engine import build_engine, init_process_group
from miles_fast.training.engine_state import inner_optimizer, own_state, pieces
from miles_fast.training.host_copy import HostCopy
from miles_fast.training.manifest import MANIFEST, CheckpointError, digest
from miles_fast.training.objective import Objective
from miles_fast.training.saving import Saver

CPU = torch.device("cpu")


def tiny_engine(root, folder, **run):
    torch.set_num_threads(1)
    init_process_group()
    config = tiny_config(root, run={"folder": str(folder), "steps": 10**6, **run})
    settings = check_ds_config(ds_tree(stage=1), "ds", config, cuda=False, ranks=1)
    tokenizer = load_tokenizer(config.model.text.tokenizer_source)
    model = build_dual_encoder(config.model, len(tokenizer))
    engine = build_engine(Objective(model, config.method, config.data.frames_per_clip), settings)
    return config, engine


def fill(engine, value):
    for piece in pieces(engine):
        piece.weight.fill_(float(value))


def saved(root, folder, steps=(1,), **run):
    """A run's folder with checkpoints whose weights all have the step as their value."""
    config, engine = tiny_engine(root, folder, **run)
    saver = Saver(Path(folder), config, engine, None, CPU)
    for step in steps:
        fill(engine, step)
        saver.start(step, [])
        saver.settle()
    return config, engine, saver


def restore(config, engine, folder, **trust):
    checkpoint = find_checkpoint(Path(folder), "auto")
    state = read_state(checkpoint, config)
    restore_checkpoint(checkpoint, state, engine, None, **trust)
    return state["step"]


def test_a_save_looks_for_its_tensors_once_and_copies_last(root, tmp_path, monkeypatch):
    """The GPU idles meanwhile; the optimizer's first update makes its moments, which are looked for anew."""
    calls = []

    def noted(function):
        return lambda *given: calls.append(function.__name__) or function(*given)

    for owner, name in ((saving, "own_state"), (saving, "counters"), (HostCopy, "take")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    config, engine, saver = saved(root, tmp_path)
    assert calls == ["counters", "own_state", "take"]
    for step, expected in ((2, ["counters", "own_state", "take"]), (3, ["counters", "take"])):
        calls.clear()
        inner = inner_optimizer(engine)
        for group in inner.param_groups:
            for weight in group["params"]:
                weight.grad = torch.full_like(weight, step)
        inner.step()
        wanted = {name: tensor.clone() for name, tensor in own_state(engine).items()}
        saver.start(step, [])
        saver.settle()
        assert calls == expected
        with safe_open(tmp_path / f"checkpoints/step-{step:08d}/rank-00000.safetensors", "pt") as file:
            assert {name.split("|")[0] for name in wanted} == {"weight", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in wanted.items())


def test_killed_at_random_moments_of_saving(root, tmp_path, finding, full):
    """Children made by fork save one checkpoint after the other until they are killed."""
    folder, kills = tmp_path / "run", 200 if full else 8
    config, engine, _ = saved(root, folder)
    shutil.copytree(folder, tmp_path / "whole")
    started = time.perf_counter()
    saver = Saver(tmp_path / "whole", config, engine, None, CPU)
    saver.start(2, [])
    saver.settle()
    seconds = time.perf_counter() - started
    rng, step, halves = random.Random(0), 1, 0
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            try:
                saver = Saver(folder, config, engine, None, CPU)
                for later in range(step + 1, step + 100):
                    fill(engine, later)
                    saver.start(later, [])
                    saver.settle()
            finally:
                os._exit(1)
        wanted = step + kill % 3  # so that some are complete on a busy machine, too
        while int((folder / "checkpoints" / "latest").read_text()[-9:]) < wanted:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.002)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        halves += bool(list((folder / "checkpoints").glob(".step-*")))
        found = restore(config, engine, folder)
        assert found >= step
        step = found
        assert all((piece.weight == step).all() for piece in pieces(engine))
    assert step > 1 and halves
    finding("F1", f"{kills} of {kills} resumed from a complete checkpoint ({halves} killed half-way)")


def test_the_newest_and_the_milestones_are_kept(root, tmp_path):
    _, _, saver = saved(root, tmp_path, range(1, 8), keep_checkpoints=2, milestone_every=3)
    names = sorted(path.name for path in saver.folder.iterdir())
    assert names == ["latest", *(f"step-0000000{step}" for step in (3, 6, 7))]
    # An abandoned future does not push out what is being written now.
    fill(saver._engine, 5)
    saver.start(5, [])
    saver.settle()
    assert {"step-00000005", "step-00000007"} <= {path.name for path in saver.folder.iterdir()}
    assert (saver.folder / "latest").read_text() == "step-00000005\n"


def test_training_goes_on_while_a_slow_disk_writes(root, tmp_path, monkeypatch, finding):
    """The writer is held up at its first file until all steps are done."""
    config, engine, saver = saved(root, tmp_path)
    released, save_file, steps = threading.Event(), saving.save_file, 20
    monkeypatch.setattr(saving, "save_file", lambda *rest: (released.wait(120), save_file(*rest)))
    fill(engine, 2)
    saver.start(2, [])
    for _ in range(steps):
        engine.backward(sum(weight.square().sum() for weight in engine.module.parameters()))
        saver.before_update()
        engine.step()
    done = engine.global_steps  # which restoring sets back
    assert done == steps and saver.busy and find_checkpoint(tmp_path, "auto").name == "step-00000001"
    assert all((piece.weight != 2).all() for piece in pieces(engine))
    released.set()
    saver.settle()
    assert restore(config, engine, tmp_path) == 2
    assert all((piece.weight == 2).all() for piece in pieces(engine))
    finding("F8", f"{done} of {steps} steps done while the writer was held up, none in its checkpoint")


def test_a_read_only_folder_keeps_the_old_checkpoint_and_says_so(root, tmp_path, monkeypatch, finding):
    config, engine, saver = saved(root, tmp_path)

    def refused(self, *rest, **options):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        saver.start(2, [])
        with pytest.raises(CheckpointError, match="Read-only file system.*older checkpoints are untouched"):
            saver.settle()
    assert restore(config, engine, tmp_path) == 1
    fill(engine, 3)
    saver.start(3, [])  # the next one is tried again
    saver.settle()
    assert restore(config, engine, tmp_path) == 3
    finding("F8", "old checkpoint kept, the error names the cause, the next save succeeds")


def relist(checkpoint, name):
    """Have the manifest name a file with its true size and hash, as somebody malicious would."""
    tree = json.loads((checkpoint / MANIFEST).read_text())
    tree["files"][name] = digest(checkpoint / name)
    (checkpoint / MANIFEST).write_text(json.dumps(tree))


def test_a_flipped_byte_of_any_file_is_found_before_loading(root, tmp_path, finding):
    config, engine, saver = saved(root, tmp_path)
    checkpoint = find_checkpoint(tmp_path, "auto")
    names = list(json.loads((checkpoint / MANIFEST).read_text())["files"])
    assert {"rank-00000.safetensors", "state.json", "student/model.safetensors"} <= set(names)
    fill(engine, 7)
    state = read_state(checkpoint, config)
    for name in names:
        data = (checkpoint / name).read_bytes()
        place = random.Random(name).randrange(len(data))
        (checkpoint / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{name.replace('.', '[.]')} does not have the SHA-256"):
            restore_checkpoint(checkpoint, state, engine, None)
        (checkpoint / name).write_bytes(data)
    (checkpoint / "rank-00000.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="has 5 bytes, the manifest says"):
        restore_checkpoint(checkpoint, state, engine, None)
    assert all((piece.weight == 7).all() for piece in pieces(engine))  # nothing was loaded
    (checkpoint / "student" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="model.safetensors has 5 bytes"):
        export_run(tmp_path, tmp_path / "out")
    finding("F12", f"{len(names)} of {len(names)} flipped bytes found before loading, the file named")


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_malicious_checkpoints_are_refused_without_side_effect(root, tmp_path, finding):
    config, engine, _ = saved(root, tmp_path / "good")
    fill(engine, 7)
    mark, cases = tmp_path / "mark", 0

    def case(match):
        """A fresh copy to spoil, then the refusal."""
        nonlocal cases
        cases += 1
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "run")
        checkpoint = find_checkpoint(tmp_path / "run", "auto")
        yield checkpoint
        with pytest.raises(CheckpointError, match=match):
            restore(config, engine, tmp_path / "run")

    for checkpoint in case("does not fit this run"):  # a pickle where safetensors belong
        (checkpoint / "rank-00000.safetensors").write_bytes(pickle.dumps(Payload(mark)))
        relist(checkpoint, "rank-00000.safetensors")
    for checkpoint in case("does not fit this run"):  # a header of 2**62 bytes
        (checkpoint / "rank-00000.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
        relist(checkpoint, "rank-00000.safetensors")
    for checkpoint in case("does not fit this run"):  # a header that claims more data than there are
        header = json.dumps({"weight|0|x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
        text = struct.pack("<Q", len(header)) + header.encode()
        (checkpoint / "rank-00000.safetensors").write_bytes(text)
        relist(checkpoint, "rank-00000.safetensors")
    for name in (
        "../../../etc/passwd",
        "/etc/passwd",
        "rank-00000.safetensors/../x",
        "student/tokenizer/../../a",
    ):
        for checkpoint in case("which no checkpoint holds: do not trust it"):
            tree = json.loads((checkpoint / MANIFEST).read_text())
            tree["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
            (checkpoint / MANIFEST).write_text(json.dumps(tree))
    for checkpoint in case("is missing or no plain file"):  # a link out of the folder
        outside = tmp_path / "outside.safetensors"
        shutil.move(checkpoint / "rank-00000.safetensors", outside)
        (checkpoint / "rank-00000.safetensors").symlink_to(outside)
    for checkpoint in case("not the name of a checkpoint beside it"):
        (checkpoint.parent / "latest").write_text("../../../tmp\n")
    for checkpoint in case("--trust-checkpoint"):  # DeepSpeed's own files, from elsewhere
        (checkpoint / MANIFEST).unlink()
        (checkpoint / "engine").mkdir()
        torch.save(Payload(mark), checkpoint / "engine" / "mp_rank_00_model_states.pt")
    for checkpoint in case("no manifest.json: it is incomplete"):
        (checkpoint / MANIFEST).unlink()
    assert not mark.exists()
    assert all((piece.weight == 7).all() for piece in pieces(engine))
    finding("F10", f"{cases} of {cases} malicious checkpoints refused, no side effect")


def test_deepspeeds_own_checkpoint_loads_when_it_is_trusted(root, tmp_path):
    config, engine, _ = saved(root, tmp_path / "run")
    checkpoint = find_checkpoint(tmp_path / "run", "auto")
    for path in [*checkpoint.glob("rank-*"), checkpoint / MANIFEST]:
        path.unlink()
    fill(engine, 9)
    engine.save_checkpoint(str(checkpoint), tag="engine", save_latest=False)
    fill(engine, 7)
    assert restore(config, engine, tmp_path / "run", trust=True) == 1
    assert all((piece.weight == 9).all() for piece in pieces(engine))


def test_one_that_was_being_replaced_is_found_and_put_back(root, tmp_path):
    config, engine, saver = saved(root, tmp_path, (1, 2))
    (saver.folder / "step-00000002").rename(saver.folder / ".step-00000002.old")
    (saver.folder / ".step-00000002.abcd").mkdir()  # what was to take its place
    assert restore(config, engine, tmp_path) == 2
    resumed = Saver(tmp_path, config, engine, None, CPU, find_checkpoint(tmp_path, "auto"))
    assert resumed.newest() == saver.folder / "step-00000002"
    assert sorted(path.name for path in saver.folder.iterdir()) == [
        "latest",
        "step-00000001",
        "step-00000002",
    ]
    shutil.rmtree(saver.folder / "step-00000002")
    assert restore(config, engine, tmp_path) == 1
    (saver.folder / "latest").unlink()  # written behind the first checkpoint; or not copied with it
    assert restore(config, engine, tmp_path) == 1


def test_a_save_does_not_need_the_tokenizers_source_any_more(root, tmp_path):
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer")
    config, engine = tiny_engine(root, tmp_path)
    text = dataclasses.replace(config.model.text, tokenizer=str(tmp_path / "tokenizer"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    saver = Saver(tmp_path, config, engine, None, CPU)
    shutil.rmtree(tmp_path / "tokenizer")
    saver.start(1, [])
    saver.settle()
    assert (find_checkpoint(tmp_path, "auto") / "student" / "tokenizer" / "tokenizer.json").is_file()


def test_no_thread_is_left_behind(root, tmp_path):
    saved(root, tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
