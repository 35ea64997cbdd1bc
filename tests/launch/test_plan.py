"""The plan: parameters counted exactly, bytes by hand, and a prediction that finds what it was made from."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import ds_tree, tiny_config, tiny_tree

from miles_fast.config_tree import load_config, to_dict
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.planning import (
    Links,
    Measured,
    Sizes,
    deciding,
    model_sizes,
    plan,
    rank_spread,
    sent_bytes,
    slowest,
    state_bytes,
)

ROOT = Path(__file__).parents[2]


def settings_of(config, stage, sums="fp32", bf16=True, accumulation=1):
    tree = ds_tree(stage, 64, accumulation, bf16) | {"data_types": {"grad_accum_dtype": sums}}
    return check_ds_config(tree, "ds", config, cuda=True, ranks=1)


def test_parameters_are_counted_as_the_model_has_them():
    config = load_config(ROOT / "launch" / "configs" / "stage2.yaml", ["run.init_from=null"])
    sizes = model_sizes(config, 30522)
    # ViT-B with divided space-time attention, DistilBERT (66.36 M), two projections to 256, the mask token.
    vit = 12 * (2 * 4 * 768**2 + 8 * 768**2 + 3 * 2 * 768 + 2 * (3 + 1) * 768 + 5 * 768)
    vit += 16 * 16 * 3 * 768 + 768 + 768 + 197 * 768 + 4 * 768 + 2 * 768
    assert sizes.snapshot == vit + 768 * 256 + 256
    assert sizes.trained == vit + 66_362_880 + 2 * (768 * 256 + 256) + 768
    kept = load_config(
        ROOT / "launch/configs/stage2.yaml", ["run.init_from=null", "run.freeze=[text_model.]"]
    )
    assert model_sizes(kept, 30522) == Sizes(
        trained=sizes.trained - 66_362_880, snapshot=sizes.snapshot, frozen=66_362_880
    )
    with pytest.raises(ValueError, match="run.freeze: no weight's name begins with 'txt.'"):
        model_sizes(tiny_config(ROOT, run={"freeze": ["txt."]}), 100)


def test_memory_and_traffic_by_hand(tmp_path):
    config, sizes = tiny_config(tmp_path), Sizes(trained=1000, snapshot=100)
    bytes_of = {stage: state_bytes(sizes, settings_of(config, stage), 4) for stage in (1, 3)}
    assert bytes_of[1] == 1000 * (2 + 6) + 12 * 1000 / 4 + 600
    assert bytes_of[3] == 1000 * (2 + 2 + 12) / 4 + 2 * 1000 + 200 + 400 / 4  # all that is gathered stays
    frozen = Sizes(trained=1000, snapshot=100, frozen=50)
    assert state_bytes(frozen, settings_of(config, 1), 4) == bytes_of[1] + 2 * 50
    limited = settings_of(config, 3)
    limited.tree["zero_optimization"]["stage3_max_live_parameters"] = 300
    assert state_bytes(sizes, limited, 4) == bytes_of[3] - 2 * 700
    assert state_bytes(sizes, settings_of(config, 2, "bf16"), 4) == 1000 * (2 + 2 / 4 + 12 / 4) + 600
    exchanged, contrast = sent_bytes(config, sizes, settings_of(config, 1), 4)
    assert exchanged == 0.75 * 1000 * (4 + 2)
    assert contrast == 0.75 * 3 * (4 * 64 * 2 * 16 * 4)
    rest = sent_bytes(config, sizes, settings_of(config, 3), 4)[1]
    assert rest == contrast + 0.75 * 100 * 2  # what the snapshot computes with
    assert sent_bytes(config, sizes, settings_of(config, 3, accumulation=2), 2)[0] == 0.5 * 1000 * 6 * 2
    assert sent_bytes(config, sizes, settings_of(config, 1), 1) == (0, 0)


def test_one_gpu_is_predicted_as_measured_and_more_are_slower_each(tmp_path):
    config, sizes = tiny_config(tmp_path), Sizes(trained=180_000_000, snapshot=114_000_000)
    settings = settings_of(config, 1)
    measured = Measured(clips_per_second=400.0, step_seconds=64 / 400, memory_gib=24.0)
    plans = [plan(config, settings, sizes, measured, Links(), gpus) for gpus in (1, 2, 8, 16, 1024)]
    assert plans[0].clips_per_second == pytest.approx(400) and plans[0].memory_gib == pytest.approx(24)
    assert all(a.efficiency > b.efficiency for a, b in zip(plans, plans[1:], strict=False))
    seconds = 0.5 * 1.08e9 / (450e9 * 0.75) + 5 * 15e-6
    assert plans[1].communication_seconds == pytest.approx(seconds, rel=0.02)
    rows = 2 * (1024 - 1) * 64 * 2 * 16 * 4 / 2**30  # of the contrast, and their gradient
    more = plans[-1].state_gib - plans[0].state_gib + rows
    assert plans[-1].memory_gib == pytest.approx(24 + more, rel=1e-9)
    slow = plan(config, settings, sizes, measured, Links(network=5), 16)
    assert slow.communication_seconds > 8 * plans[3].communication_seconds


def test_waiting_for_the_slowest_rank_is_found_from_a_few_and_foretold_for_more(tmp_path):
    config, sizes = tiny_config(tmp_path), Sizes(trained=180_000_000, snapshot=114_000_000)
    settings, spread = settings_of(config, 1), 0.005
    alone = Measured(clips_per_second=400.0, step_seconds=0.16, memory_gib=None)
    generator = torch.Generator().manual_seed(0)
    for ranks in (2, 4, 64):
        drawn = torch.randn(20_000, ranks, generator=generator, dtype=torch.float64).amax(1).mean()
        assert slowest(ranks) == pytest.approx(drawn.item(), rel=0.08)
    quick = plan(config, settings, sizes, alone, Links(), 2)
    assert quick.waiting_seconds == 0
    late = 0.16 + quick.communication_seconds + spread * slowest(2)
    seen = Measured(clips_per_second=128 / late, step_seconds=late, memory_gib=None)
    found = rank_spread(quick, seen)
    assert found == pytest.approx(spread)
    two, many = (plan(config, settings, sizes, alone, Links(), gpus, spread=found) for gpus in (2, 64))
    assert two.clips_per_second == pytest.approx(128 / late)
    assert 3.5 < many.waiting_seconds / two.waiting_seconds < 4.5
    faster = Measured(clips_per_second=900.0, step_seconds=128 / 900, memory_gib=None)
    assert rank_spread(quick, faster) == 0


def test_the_program_compares_with_what_was_measured(tmp_path, capsys, monkeypatch):
    sys.path.insert(0, str(ROOT / "launch"))
    import plan as program

    for name, speed, memory in (("one", 400.0, 24.0), ("two", 780.0, None), ("four", 1600.0, 12.0)):
        record = {"step": 1, "clips_per_second": speed, "memory_gib": memory}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    files = [f"{gpus}={tmp_path / name}.jsonl" for gpus, name in ((1, "one"), (2, "two"), (4, "four"))]
    monkeypatch.setattr(sys, "argv", ["plan.py", "--gpus", "1", "1024", "--measured", *files])
    program.main()
    out = capsys.readouterr().out
    assert "180.9 M parameters" in out and "measured 780 clips/s: the waiting is taken from it" in out
    rows = {int(line.split()[0]): line for line in out.splitlines() if re.match(r" +\d+ GPUs", line)}
    assert list(rows) == [1, 2, 4, 1024]
    two, four = rows[2], rows[4]
    error = float(re.search("12.0 GiB: predicted (.*) %", four)[1])
    assert error == pytest.approx(100 * (float(four.split()[3]) / 12 - 1), abs=0.5)
    assert two.count("predicted") == 0 and "measured 1,600 clips/s: predicted -" in four
    rows = [{"gpus": 1, "clips_per_second": 555.0}]
    (tmp_path / "rows.json").write_text(json.dumps({"batch": 128, "scaling": rows}))
    monkeypatch.setattr(sys, "argv", ["plan.py", "--measured", f"1={tmp_path / 'rows.json'}"])
    with pytest.raises(ValueError, match="rows.json: measured with 128 clips.*zero1.json has .* = 64; name"):
        program.main()
    monkeypatch.setattr(sys, "argv", ["plan.py", "--measured", "2=nowhere.jsonl"])
    with pytest.raises(OSError):
        program.main()


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import plan

    return plan


@pytest.fixture
def measurement(program, tmp_path):
    """What the program reads of a file, planning the tiny config with 64 clips a GPU."""
    (tmp_path / "run").mkdir()
    config = tiny_config(tmp_path)
    planned = program.Planned(
        config=config, config_file="tiny.yaml", settings=settings_of(config, 1), ds_config="ds.json"
    )

    def read(name, content, gpus=1):
        file = tmp_path / "run" / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return program._measurement(f"{gpus}={file}", planned)[1]

    return read


@pytest.mark.parametrize(
    "option, value, said",
    [
        *((name, value, "1 or greater") for name in ("gpus", "gpus-per-host") for value in ("0", "-3", "x")),
        ("vocabulary", "0", "1 or greater"),
        *((name, value, "above 0") for name in ("nvlink", "network") for value in ("0", "-1", "nan", "inf")),
        *(("link-efficiency", value, "above 0, 1 at most") for value in ("0", "1.5")),
        *(("hidden", value, "from 0 to 1") for value in ("3", "-0.1", "nan")),
    ],
)
def test_options_that_mean_nothing_are_refused(program, monkeypatch, capsys, option, value, said):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--measured", "1=log.jsonl", f"--{option}={value}"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    err = capsys.readouterr().err
    assert f"--{option}: '{value}': write a" in err and said in err


GOOD = (
    json.dumps({"step": 1, "clips_per_second": 400.0, "step_milliseconds": 160.0, "memory_gib": None}) + "\n"
)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", "[]", "a.json: not what benchmarks/throughput.py writes"),
        ("a.json", '{"scaling": 1}', "a.json: not what"),
        ("a.json", '{"scaling": [1]}', "a.json: not what"),
        ("a.json", '{"step": {}}', "a.json: not what"),
        ("a.json", '{"config": 1}', "a.json: not what"),
        ("a.json", '{"config": {"model": 1}}', "a.json: not what"),
        ("a.json", '{"scaling": [{"clips_per_second": 1.0}]}', "a.json: holds no clips_per_second above 0"),
        ("a.json", '{"scaling": [{"gpus": 1, "clips_per_second": null}]}', "a.json: holds no"),
        ("a.json", '{"scaling": [{"gpus": 1, "clips_per_second": 0}]}', "a.json: holds no"),
        ("a.json", '{"batch": 64, "step": [{"clips_per_second": 9.0, "batch": 32}]}', "32 clips a GPU"),
        ("a.json", b"\xff", "a.json: not json"),
        ("a.jsonl", b"\xff\n", "a.jsonl: line 1 is not a record"),
        ("a.jsonl", GOOD + "[1]\n", r"a.jsonl: line 2 is not a record \(\[1\]\)"),
        ("a.jsonl", GOOD + GOOD + GOOD[:9] + "\n" + GOOD, "a.jsonl: line 3 is not a record"),
        (
            "a.jsonl",
            '{"step": 1, "clips_per_second": null}\n{"step": 2, "clips_per_second": 0}\n',
            "a.jsonl: holds no",
        ),
        ("a.jsonl", '{"step": 1, "clips_per_second": "9"}\n', "a.jsonl: holds no"),
    ],
)
def test_files_that_hold_no_measurement_are_named(measurement, name, content, said):
    with pytest.raises(ValueError, match=said):
        measurement(name, content)


def test_a_log_whose_last_line_is_cut_is_read(measurement):
    assert measurement("log.jsonl", GOOD * 3 + GOOD[:20]).clips_per_second == 400
    zero = json.dumps({"step": 1, "clips_per_second": 0, "step_milliseconds": 1.0}) + "\n"
    assert measurement("log.jsonl", (GOOD + zero) * 3).step_seconds == 64 / 400


def test_a_log_of_another_batch_or_of_more_gpus_is_refused(measurement):
    assert measurement("log.jsonl", GOOD.replace("400.0", "800.0"), gpus=2).clips_per_second == 800
    with pytest.raises(
        ValueError, match="log.jsonl: measured with 64 clips a step.*64 x 1 on each of 2 GPUs"
    ):
        measurement("log.jsonl", GOOD, gpus=2)
    with pytest.raises(
        ValueError, match="measured with 32 clips a step, but .* of ds.json are .* --ds_config"
    ):
        measurement("log.jsonl", GOOD.replace("160.0", "80.0"))


def test_a_log_of_another_config_is_refused(measurement, tmp_path):
    run = tmp_path / "run"

    def write(**sections):
        (run / "config.json").write_text(json.dumps(to_dict(tiny_config(tmp_path, **sections))))

    text = tiny_tree(tmp_path)["model"]["text"]
    write(run={"steps": 9}, model={"text": text | {"tokenizer": "elsewhere"}})
    assert measurement("log.jsonl", GOOD).clips_per_second == 400
    other = {"model": {"embedding": 32}, "data": {"frames_per_clip": 1}, "method": {"view": "B"}}
    write(**other, run={"freeze": ["text_model."]})
    changed = "model.embedding: 32 -> 16; data.frames_per_clip: 1 -> 2; method.view: 'B' -> 'A'"
    changed += "; run.freeze: ['text_model.'] -> None"
    said = f"log.jsonl: measured with another config than tiny.yaml .*: {re.escape(changed)}. Plan .*--config"
    with pytest.raises(ValueError, match=said):
        measurement("log.jsonl", GOOD)


def test_a_benchmark_of_another_config_is_refused_where_its_file_has_it(measurement, tmp_path):
    def tree(**sections):
        head = {"batch": 64, "config": deciding(tiny_config(tmp_path, **sections))}
        return json.dumps(head | {"step": [{"clips_per_second": 400.0}]})

    assert measurement("a.json", tree(run={"steps": 9})).clips_per_second == 400
    with pytest.raises(ValueError, match="a.json: measured with another .*: method.view: 'B' -> 'A'. Plan"):
        measurement("a.json", tree(method={"view": "B"}))
