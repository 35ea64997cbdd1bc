"""F6: gradients and losses that are not finite, spikes, rollback, lost updates, collapse."""

import json
import logging

import pytest
import torch
from tiny import FLOAT32_SUMS, ds_tree, tiny_config
from torch import nn

from miles_fast.training import loop
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.engine import build_engine, init_process_group
from miles_fast.training.engine_state import pieces
from miles_fast.training.loop import pretrain
from miles_fast.training.numerics import (
    FEWEST,
    LossGuard,
    NumericsError,
    SkippedData,
    UpdateCheck,
)
from miles_fast.training.objective import Losses
from miles_fast.training.progress import read_log


def losses(value):
    zero = torch.zeros(())
    return Losses(torch.tensor(value, requires_grad=True), zero, zero, zero, zero)


def files_of(run, name):
    from safetensors.torch import load_file

    folder = run / "checkpoints" / name
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    state = json.loads((folder / "state.json").read_text())
    return {key: tensor for part in parts for key, tensor in part.items()}, state["counters"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind,accumulation", [("nan-data", 1), ("nan-gradient", 2)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_of_one_rank_changes_nothing_on_any(
    start, tmp_path, finding, full, stage, kind, accumulation, precision
):
    if not full and (stage, kind, precision) not in ((1, "nan-data", "fp32"), (3, "nan-gradient", "bf16")):
        pytest.skip("make faults runs the others")
    options = ["--steps", "4", "--stage", str(stage), "--accumulation", str(accumulation)]
    options += ["--wait-for-saves", "--run-keys", '{"save_every": 1, "keep_checkpoints": 9}']
    if precision == "bf16":
        sums = FLOAT32_SUMS if stage == 1 else {}
        options += ["--ds-keys", json.dumps({"bf16": {"enabled": True}} | sums)]
    # Gradients are counted in micro steps: only the first one of step 3 is spoiled.
    when = 3 if kind == "nan-data" else 2 * accumulation + 1
    run = start(tmp_path / "run", 2, *options, "--fault", f"{kind}:{when}:1")
    assert run.wait() == [0, 0], run.errors
    before, counts = files_of(tmp_path / "run", "step-00000002")
    after, later = files_of(tmp_path / "run", "step-00000003")
    same = {key for key in before if not key.startswith("random")}
    assert same == {key for key in after if not key.startswith("random")}
    assert all(torch.equal(before[key], after[key]) for key in same)  # weights, moments, snapshot
    assert counts["scheduler"] == later["scheduler"] and counts["optimizer"] == later["optimizer"]
    assert later["engine"]["skipped_steps"] == counts["engine"]["skipped_steps"] + 1
    last, _ = files_of(tmp_path / "run", "step-00000004")
    assert not all(torch.equal(before[key], last[key]) for key in same)
    assert all(tensor.isfinite().all() for key, tensor in last.items() if not key.startswith("random"))
    log = read_log(tmp_path / "run")
    blamed = [record["skipped"] for record in log if "skipped" in record]
    assert len(blamed) == 1 and log[-1]["skipped_steps"] == 1
    keys = [json.loads(line) for line in (tmp_path / "run.keys1.jsonl").read_text().splitlines()]
    culprit = next(entry for entry in blamed[0] if entry["rank"] == 1)
    assert culprit["keys"] == next(entry["keys"] for entry in keys if entry["data"] == 3)
    if kind == "nan-data":  # whose loss was bad is named alone
        assert [entry["rank"] for entry in blamed[0]] == [1]
    finding("F6", f"{kind} on one rank, ZeRO 0 to 3, {precision}: skipped on both, state bit-equal")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["spike", "nan-data"])
def test_bad_steps_of_one_rank_in_a_row_take_all_ranks_back(start, tmp_path, finding, full, kind, precision):
    if not full and (kind, precision) != ("spike", "bf16"):
        pytest.skip("make faults runs the others")
    bad, last = FEWEST + 2, FEWEST + 4  # a median and a checkpoint come before
    run = {"save_every": FEWEST, "max_skipped_steps": 2}
    if kind == "spike":
        run |= {"spike_factor": 10.0}
    options = ["--steps", str(last), "--wait-for-saves", "--run-keys", json.dumps(run)]
    if precision == "bf16":
        options += ["--ds-keys", json.dumps({"bf16": {"enabled": True}} | FLOAT32_SUMS)]
    ranks = start(tmp_path / "run", 2, *options, "--fault", f"{kind}:{bad}-{bad + 1}:1")
    assert ranks.wait() == [0, 0], ranks.errors
    log = read_log(tmp_path / "run")
    skipped = [record for record in log if "skipped" in record]
    assert [record["step"] for record in skipped] == [bad, bad + 1]
    assert [[entry["rank"] for entry in record["skipped"]] for record in skipped] == [[1], [1]]
    back = next(record for record in log if "rolled_back_to" in record)
    assert back["rolled_back_to"] == FEWEST and back["skipped_data"] == [[bad - 1, bad + 1]]
    figures = [(r["step"], r["loss"]) for r in log if "loss" in r]
    assert [step for step, _ in figures] == [*range(1, bad + 1), *range(FEWEST + 1, last + 1)]
    assert figures[bad] == figures[FEWEST]  # from the same state and the same data
    for name in ("run.keys0.jsonl", "run.keys1.jsonl"):
        dealt = [json.loads(line)["data"] for line in (tmp_path / name).read_text().splitlines()]
        assert dealt == [*range(1, bad + 2), *range(FEWEST + 1, last + 3)]
    finding("F6", f"{kind} on one of two ranks, {precision}: skipped on both, after 2 in a row both go back")


def train(root, folder, deal, resume=None, evaluate=None, **run):
    config = tiny_config(root, run={"folder": str(folder), **run})
    settings = check_ds_config(ds_tree(stage=1), "ds", config, cuda=False, ranks=1)
    pretrain(config, settings, resume=resume, deal=deal, evaluate=evaluate)
    return read_log(folder)


def spoiled(bad, seen):
    """Batches whose data steps `bad` hold NaN; `seen` gets the data steps in the order they are used."""
    from dataclasses import replace

    from miles_fast.data.loader import Loader

    def deal(loader, first):
        for data, batch in enumerate(Loader.batches(loader, first), start=first):
            seen.append(data)
            if data in bad:
                batch = replace(batch, video_BTCHW=batch.video_BTCHW * float("nan"))
            yield batch

    return deal


def test_after_some_bad_steps_in_a_row_it_goes_back_and_leaves_their_data_out(root, tmp_path, finding):
    seen = []
    log = train(root, tmp_path / "run", spoiled({4, 5}, seen), steps=6, save_every=3, max_skipped_steps=2)
    assert seen == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert [r["step"] for r in log if "skipped" in r] == [5, 6]
    back = next(r for r in log if "rolled_back_to" in r)
    assert back["rolled_back_to"] == 3 and back["skipped_data"] == [[4, 6]]
    losses = [r["loss"] for r in log if "loss" in r and r["loss"] == r["loss"]]
    assert losses[3] == losses[4]  # step 4 again, from the same state and the same data
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["step"] == 6 and state["skipped_data"] == [[4, 6]]
    finding("F6", "after K in a row it goes back and leaves their data out")


def test_data_before_a_checkpoint_between_skipped_steps_are_not_left_out_again(root, tmp_path):
    seen, bad = [], {3, 4, 5, 6}
    log = train(root, tmp_path / "run", spoiled(bad, seen), steps=9, save_every=5, max_skipped_steps=4)
    back = next(r for r in log if "rolled_back_to" in r)
    assert back["rolled_back_to"] == 5 and back["skipped_data"] == [[5, 7]]
    assert seen == list(range(11))


def test_going_back_to_the_start_forgets_what_the_optimizer_had_gathered(root, tmp_path):
    options = {"steps": 6, "save_every": 99, "evaluate_every": 99, "patience": 1, "max_skipped_steps": 2}
    ways = dict.fromkeys(("text_to_video", "video_to_text"), dict.fromkeys(("r1", "r5", "r10"), 0.0))
    deal = spoiled({4, 5}, [])
    log = train(root, tmp_path / "run", deal, evaluate=lambda *_: {"heldout": ways}, **options)
    assert [r["rolled_back_to"] for r in log if "rolled_back_to" in r] == [0]
    losses = [r["loss"] for r in log if "loss" in r and r["loss"] == r["loss"]]
    assert losses[:4] == losses[4:8]


@pytest.mark.parametrize("folder", ["run", "other"])
def test_a_resumed_run_goes_back_to_what_it_resumed_from_until_it_saves(root, tmp_path, folder):
    options = {"steps": 6, "save_every": 2, "max_skipped_steps": 2, "keep_checkpoints": 9}
    train(root, tmp_path / "run", spoiled(set(), []), **options)
    start, seen = tmp_path / "run" / "checkpoints" / "step-00000002", []
    log = train(root, tmp_path / folder, spoiled({2, 3, 6, 7}, seen), resume=str(start), **options)
    assert [r["rolled_back_to"] for r in log if "rolled_back_to" in r] == [2, 4]
    assert seen == list(range(2, 10))


def test_it_gives_up_when_going_back_does_not_help(root, tmp_path):
    bad = set(range(3, 100))
    with pytest.raises(NumericsError, match="after 1 rollbacks"):
        train(
            root,
            tmp_path / "run",
            spoiled(bad, []),
            **{"steps": 9, "save_every": 3, "max_skipped_steps": 2, "max_rollbacks": 1},
        )
    with pytest.raises(NumericsError, match="no checkpoint to go back to"):
        train(root, tmp_path / "other", spoiled({0, 1}, []), steps=6, max_skipped_steps=2)


def test_positions_jump_over_data_that_are_left_out(root):
    config = tiny_config(root, run={"folder": "x", "steps": 9, "max_skipped_steps": 1}).run
    left_out = SkippedData(config, [(2, 4), (5, 6)])
    assert [left_out.position(step) for step in range(6)] == [0, 1, 4, 6, 7, 8]
    assert left_out.skipped(4)
    left_out.leave_out(2)
    assert left_out.ranges == [(2, 6)]
    assert [left_out.position(step) for step in range(4)] == [0, 1, 6, 7]


def test_a_resumed_run_knows_a_spike_at_once(root, tmp_path, monkeypatch):
    check, seen, options = LossGuard.check, [], {"spike_factor": 10.0, "save_every": 18}

    def with_a_spike(guard, losses, keys):
        seen.append(keys)
        return check(guard, losses._replace(total=losses.total * (1000 if len(seen) == 20 else 1)), keys)

    monkeypatch.setattr(LossGuard, "check", with_a_spike)
    train(root, tmp_path / "run", spoiled(set(), []), steps=18, **options)
    log = train(root, tmp_path / "run", spoiled(set(), []), resume="auto", steps=20, **options)
    assert [record["step"] for record in log if "skipped" in record] == [20]


def test_a_spike_is_skipped_and_does_not_raise_the_bar():
    guard, device = LossGuard(10.0, torch.device("cpu")), torch.device("cpu")
    plain = LossGuard(None, device)
    for number in range(FEWEST):
        value = losses(1.0 + 0.01 * number)
        guard.check(value, ()).backward()
        assert value.total.grad == 1
    for value, good in ((9.0, True), (12.0, False), (12.0, False), (1.0, True), (float("inf"), False)):
        spike, unwatched = losses(value), losses(value)
        guard.check(spike, ("a",)).backward()
        assert bool(spike.total.grad.isfinite()) is good
        plain.check(unwatched, ()).backward()
        assert bool(unwatched.total.grad.isfinite()) is (value != float("inf"))


@pytest.mark.parametrize("lost", [1, 3])
def test_an_update_that_changes_nothing_is_an_error_on_steps_that_are_not_logged_too(
    root, tmp_path, monkeypatch, lost
):
    build = loop.build_engine

    def lame(objective, settings):
        engine = build(objective, settings)
        step = engine.optimizer.optimizer.step  # for one group of parameters after the other
        monkeypatch.setattr(
            engine.optimizer.optimizer, "step", lambda: None if engine.global_steps == lost - 1 else step()
        )
        return engine

    monkeypatch.setattr(loop, "build_engine", lame)
    with pytest.raises(NumericsError, match=f"step {lost} changed none of the sampled weights.*8415"):
        train(root, tmp_path / "run", spoiled(set(), []), steps=6, log_every=5)


def halves(root, rate, stage=1, **more):
    """A net of halves under bf16, its update check, and a step of it by a loss."""
    init_process_group()
    tree = ds_tree(stage=stage, batch=2, bf16=True) | more
    tree["optimizer"]["params"]["lr"] = rate
    settings = check_ds_config(tree, "ds", tiny_config(root), cuda=False, ranks=1)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    for weight in net.parameters():
        nn.init.constant_(weight, 0.5)
    engine = build_engine(net, settings)
    check = UpdateCheck(engine)

    def step(number, factor=1.0):
        check.before()
        engine.backward(engine(torch.ones(2, 6, dtype=torch.bfloat16)).float().square().sum() * factor)
        engine.step()
        check.after(number)

    return engine, check, step


@pytest.mark.parametrize("stage,more", [(0, {}), (1, {}), (1, FLOAT32_SUMS), (3, {})])
def test_a_rate_too_small_for_bf16_is_no_lost_update(root, stage, more):
    engine, check, step = halves(root, 1e-6, stage, **more)
    for number in (1, 2, 3):
        step(number)
    if stage < 3:
        assert all((weight == 0.5).all() for weight in engine.module.parameters())
    assert any((piece.weight != 0.5).any() for piece in pieces(engine))
    check.verify()
    engine, check, step = halves(root, 1e-12, stage, **more)  # too small for float32, too
    step(1)
    with pytest.raises(NumericsError, match="step 1 changed none"):
        check.verify()


@pytest.mark.parametrize("more", [{}, FLOAT32_SUMS])
def test_a_step_that_deepspeed_skips_and_reports_as_applied_is_an_error(root, more):
    engine, check, step = halves(root, 1e-2, **more)
    step(1)
    check.verify()
    step(2, float("nan"))
    assert engine.skipped_steps == 1 and not engine.was_step_applied()  # a version that is honest
    with pytest.raises(NumericsError, match="step 2 changed none.*8415"):
        check.verify()  # which is called for applied steps alone


@pytest.mark.parametrize("bound", [0.0, 9.0])
def test_a_run_warns_of_targets_that_collapse(root, tmp_path, caplog, monkeypatch, bound):
    monkeypatch.setattr(logging.getLogger("miles_fast"), "propagate", True)
    with caplog.at_level(logging.WARNING, "miles_fast"):
        log = train(root, tmp_path / "run", spoiled(set(), []), steps=1, min_target_std=bound)
    warnings = [text for text in caplog.messages if "the targets collapse" in text]
    assert len(warnings) == (bound > 0)
    assert all(f"{log[0]['target_std']:.3g}, below run.min_target_std = {bound:g}" in w for w in warnings)
