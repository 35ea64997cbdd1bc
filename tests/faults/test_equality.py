"""F2, F3: ZeRO stages, numbers of ranks and resumes in another shape give the same training."""

import itertools
import json

import numpy as np
import pytest
from safetensors.torch import load_file

from miles_fast.export.run import export_run
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
    np.testing.assert_allclose(losses(run), losses(reference), rtol=2e-4)
    assert len(losses(run)) == steps
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
