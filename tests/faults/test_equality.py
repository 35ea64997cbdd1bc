"""F2, F3: ZeRO stages, numbers of ranks and resumes in another shape give the same training."""

import itertools
import json

import numpy as np
import pytest
from safetensors.torch import load_file

from miles_fast.export.run import export_run
from miles_fast.training.checkpoint import find_checkpoint
from miles_fast.training.progress import read_log
from miles_fast.training.signals import STOPPED


def losses(run):
    names = ("loss", "contrastive", "regression", "gradient_norm")
    return np.array([[record[name] for name in names] for record in read_log(run) if "loss" in record])


def keys_of(run, ranks):
    """Sample keys of every micro step, ranks in order."""
    parts = []
    for rank in range(ranks):
        text = run.with_name(f"{run.name}.keys{rank}.jsonl").read_text()
        parts.append([json.loads(line)["keys"] for line in text.splitlines()])
    return [sum(keys, []) for keys in zip(*parts, strict=True)]


def exported(run):
    return load_file(export_run(run, run.with_name(f"{run.name}.export")) / "model.safetensors")


def assert_same(run, reference, steps):
    found, expected = losses(run), losses(reference)
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], rtol=2e-4)
    np.testing.assert_allclose(found[:, -1], expected[:, -1], rtol=1e-3)  # the norm, of sums in another order
    assert len(found) == steps
    name = f"step-{steps:08d}"
    one, two = (load_file(r / "checkpoints" / name / "snapshot.safetensors") for r in (run, reference))
    assert one.keys() == two.keys()
    mine, other = exported(run), exported(reference)
    assert mine.keys() == other.keys()
    # Adam turns the sign of a gradient near zero into a whole step: some weights differ by a few rates.
    for a, b in ((one, two), (mine, other)):
        apart = np.concatenate([(a[key] - b[key]).abs().numpy().ravel() for key in a])
        assert apart.max() <= 2.1e-3 * steps and apart.mean() < 2e-5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stages_and_ranks_train_the_same(start, tmp_path, finding, full, accumulation):
    if not full:
        pytest.skip("make faults runs 20 steps of ZeRO 0-3 on 1, 2 and 4 ranks; tests/training a small one")
    steps, shapes = 20, list(itertools.product((1, 2, 4), (0, 1, 2, 3)))
    for ranks, stage in shapes:
        options = ("--steps", str(steps), "--stage", str(stage), "--accumulation", str(accumulation))
        folder = tmp_path / f"r{ranks}s{stage}"
        run = start(folder, ranks, *options, "--run-keys", '{"save_every": 20}')
        assert run.wait(600) == [0] * ranks, run.errors
        assert_same(folder, tmp_path / "r1s0", steps)
    finding("F3", f"{len(shapes)} shapes (ZeRO 0-3, 1/2/4 ranks, accumulation {accumulation}): same 20 steps")


def test_a_run_goes_on_with_other_ranks_and_stages(start, tmp_path, finding):
    """Two ranks of ZeRO 2, then one of ZeRO 0, then two of ZeRO 3, against one run of ZeRO 1 on one rank."""
    reference, folder = tmp_path / "reference", tmp_path / "run"
    whole = start(reference, 1, "--steps", "6")
    assert whole.wait() == [0], whole.errors
    seen = []
    for ranks, stage, told in ((2, 2, 1), (1, 0, 3), (2, 3, None)):
        again = ("--resume", "auto") if seen else ()
        stop = ("--fault", f"term:{told}:0") if told else ()  # takes effect after the step behind it
        run = start(folder, ranks, "--steps", "6", "--stage", str(stage), *stop, *again)
        assert run.wait() == [STOPPED if told else 0] * ranks, run.errors
        fresh = keys_of(folder, ranks)
        assert len(fresh) == 2
        seen += fresh
        for path in folder.parent.glob("run.keys*"):
            path.unlink()
    assert seen == keys_of(reference, 1)
    assert_same(folder, reference, 6)
    finding("F3", "2 -> 1 -> 2 ranks, ZeRO 2 -> 0 -> 3: same samples, none lost or repeated, same losses")


def test_ranks_that_share_the_snapshots_average_save_it_whole(start, tmp_path):
    """At ZeRO 3 in bf16: 4 = 2 + 2 steps bit for bit, whose average one rank of ZeRO 1 goes on with."""
    keys = ("--steps", "4", "--run-keys", '{"save_every": 2}', "--ds-keys", '{"bf16": {"enabled": true}}')
    averages = []
    for folder, ranks, stage, more in (
        ("whole", 2, 3, ()),
        ("parted", 2, 3, ("--fault", "term:1:0")),
        ("parted", 2, 3, ("--resume", "auto")),
        ("alone", 1, 1, ("--resume", str(tmp_path / "whole" / "checkpoints" / "step-00000002"))),
    ):
        run = start(tmp_path / folder, ranks, *keys, "--stage", str(stage), *more)
        assert run.wait() == [STOPPED if "--fault" in more else 0] * ranks, run.errors
        newest = find_checkpoint(tmp_path / folder, "auto")
        averages.append((newest / "snapshot.safetensors").read_bytes())
        assert not [path for path in newest.rglob("*") if path.name.startswith(".")]
    assert averages[0] == averages[2] != averages[1]
    np.testing.assert_allclose(losses(tmp_path / "alone"), losses(tmp_path / "whole")[2:], rtol=0.02)


def test_a_run_with_frozen_weights_is_saved_by_two_ranks_and_goes_on_with_one(start, tmp_path):
    keys = ("--steps", "4", "--run-keys", json.dumps({"save_every": 2, "freeze": ["text_model."]}))
    whole = start(tmp_path / "whole", 1, *keys)
    assert whole.wait() == [0], whole.errors
    for ranks, stage, stop in ((2, 2, ("--fault", "term:1:0")), (1, 1, ("--resume", "auto"))):
        run = start(tmp_path / "run", ranks, *keys, "--stage", str(stage), *stop)
        assert run.wait() == [0 if ranks == 1 else STOPPED] * ranks, run.errors
    assert_same(tmp_path / "run", tmp_path / "whole", 4)


@pytest.mark.parametrize("ranks,stage", [(2, 1), (3, 3)])
def test_fine_tuning_on_several_ranks_is_that_of_one(start, tmp_path, finding, full, ranks, stage):
    """Learning rates by prefix, the start kept as the best model; three ranks evaluate 4, 4 and 2 clips."""
    if not full:
        pytest.skip("make faults runs it; tests/training evaluates at ZeRO 3 on one rank")
    scales = {"video_model.": 0.1, "vid_proj.": 10.0, "text_model.": 0.5}
    keys = {"evaluate_every": 2, "patience": 9, "save_every": 2, "keep_checkpoints": 9, "lr_scale": scales}
    options = ("--steps", "4", "--joined", "6", "--evaluate", "--run-keys", json.dumps(keys))
    for folder, number in (("one", 1), ("several", ranks)):
        run = start(tmp_path / folder, number, *options, "--stage", str(stage))
        assert run.wait() == [0] * number, run.errors
    one, several = tmp_path / "one", tmp_path / "several"
    assert_same(several, one, 4)
    starts = [
        load_file(r / "checkpoints" / "step-00000000" / "student" / "model.safetensors")
        for r in (one, several)
    ]
    assert all(np.array_equal(starts[0][name], starts[1][name]) for name in starts[0] | starts[1])
    evaluations = [[r["evaluation"] for r in read_log(r) if "evaluation" in r] for r in (one, several)]
    assert len(evaluations[0]) == 3 and evaluations[0] == evaluations[1]
    best = [json.loads((r / "best" / "best.json").read_text()) for r in (one, several)]
    assert best[0] == best[1]
    finding(
        "F3", f"fine-tuning on {ranks} ranks, ZeRO {stage}: start, rates, evaluations and best model of one"
    )
