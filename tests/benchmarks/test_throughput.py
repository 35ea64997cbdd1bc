"""The throughput programs on the tiny model, and the doctor's words on made-up measurements."""

import contextlib
import json
import os
import re
import sys
import threading
import time
import weakref
from dataclasses import replace
from math import log10
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from fork_server import run
from tiny import FLOAT32_SUMS, ds_tree, tiny_config, tiny_tree, write_data

from miles_fast.data.demo_corpus import Recipe, build_demo_corpus
from miles_fast.data.shards import ShardSet
from miles_fast.models.flops import training_flops

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("benchmarks")
    write_data(place)
    (place / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree(place)))
    (place / "ds.json").write_text(json.dumps(ds_tree(stage=1)))
    return place


@pytest.fixture
def doctor(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import doctor

    return doctor


def throughput(root, what, *options, timeout=250):
    command = [str(BENCHMARKS / "throughput.py"), what, "--batches", "3"]
    files = ["--config", str(root / "tiny.yaml"), "--ds_config", str(root / "ds.json")]
    done = run(*command, *files, *options, cwd=root, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def call(root, what, *options, timeout=250):
    printed = throughput(root, what, "--json", str(root / f"{what}.json"), *options, timeout=timeout)
    return printed, json.loads((root / f"{what}.json").read_text())[what]


@pytest.fixture(scope="module")
def videos(root):
    corpus = build_demo_corpus(root / "corpus", Recipe(num_train=8, num_heldout=2), workers=1)
    return [str(path) for path in corpus.train_tars]


@pytest.mark.parametrize(
    "options, said",
    [
        (["loader", "--batches", "0"], "--batches: '0': write a whole number, 1 or greater"),
        (["saves", "--saves", "0"], "--saves: '0': write"),
        (["step", "--profile", "-1"], "--profile: '-1': write"),
        (["loader", "--rival-seconds", "nan"], "--rival-seconds: 'nan': write a number above 0"),
        (["scaling", "--gpus", "1", "0"], "--gpus: '0': write"),
        (["scaling", "--gpus", "-3"], "--gpus: '-3': write"),
        (["scaling", "--gpus", "two"], "--gpus: 'two': write"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, options, said):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import throughput

    with pytest.raises(SystemExit, match="2"):
        throughput.arguments().parse_intermixed_args(options)
    assert said in capsys.readouterr().err


def test_an_error_of_the_user_is_one_line(root):
    done = run(str(BENCHMARKS / "throughput.py"), "loader", "--config", "nope.yaml", cwd=root, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: nope.yaml: no such config file")


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "micro.json"),
        ("{", "micro.json: not json"),
        ("[]", "micro.json: holds no timings"),
        ("{}", "micro"),
    ],
)
def test_the_roofline_is_read_before_anything_is_measured(tmp_path, root, monkeypatch, text, said):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import throughput

    if text is not None:
        (tmp_path / "micro.json").write_text(text)
    monkeypatch.setitem(throughput.PROGRAMS, "model", lambda *_: pytest.fail("measured"))
    files = ["--config", str(root / "tiny.yaml"), "--ds_config", str(root / "ds.json")]
    options = ["--micro", str(tmp_path / "micro.json"), "--report", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "model", *files, *options])
    with pytest.raises((ValueError, OSError), match=said):
        throughput.main()


def test_loader_beside_its_rivals(root, videos):
    printed, figures = call(root, "loader", "--rival-seconds", "0.5", "--videos", *videos)
    rates = [value for name, value in figures.items() if name.endswith("per_second")]
    assert len(rates) == 5 and min(rates) > 0
    assert figures["frames_per_second"] == pytest.approx(2 * figures["clips_per_second"])
    assert figures["takes"] == "jpeg" and "torch_dataloader_pyav" in printed
    assert figures["batch_bytes"] == pytest.approx(4 * 2 * 3000, rel=0.9)


def test_decoders_on_the_same_videos(root, videos):
    _, figures = call(root, "decoders", "--rival-seconds", "0.5", "--videos", *videos)
    rates = {name: value for name, value in figures.items() if name.endswith("clips/s")}
    expected = {"frames clips/s", "raw PyAV clips/s", "transcode PyAV clips/s"}
    assert rates.keys() >= expected and min(rates.values()) > 0


def test_loss_as_configured_follows_the_published_one(root):
    page = root / "curves.html"
    printed, found = call(root, "curves", "--report", str(page))
    reference, in_bf16, configured = found.values()
    assert len(reference) == 3 and len(set(reference)) == 3
    # Two compute in float32 here, and what is left of their difference is their order of summing.
    assert configured == pytest.approx(reference, rel=1e-4)
    assert in_bf16 == pytest.approx(reference, rel=1e-2) != pytest.approx(reference, rel=1e-5)
    assert "as configured" in printed and page.read_text().count("<polyline") == 3


def test_fp8_is_judged_by_two_seeds(root, monkeypatch):
    tree = tiny_tree(root)
    tree["model"]["video"]["width"] = 32
    (root / "wide.yaml").write_text(yaml.safe_dump(tree))
    files = ("--config", str(root / "wide.yaml"), "--json", str(root / "fp8.json"))
    printed = throughput(root, "curves", "--fp8", *files, "--report", str(root / "fp8.html"))
    found = json.loads((root / "fp8.json").read_text())["fp8"]
    bf16, other, fp8 = found["losses"].values()
    assert list(found["losses"])[1:] == ["bf16 linear layers, seed 1", "fp8 linear layers, seed 0"]
    # Three steps are fewer than are smoothed over: one mean each.
    assert found["fp8_mean"] == found["fp8_largest"] == pytest.approx(abs(sum(fp8) - sum(bf16)) / 3)
    assert found["seed_mean"] == pytest.approx(abs(sum(other) - sum(bf16)) / 3)
    assert found["within"] == (0 < found["fp8_mean"] <= found["seed_mean"])
    assert f"{found['seed_mean']:.4f}" in printed and "within the spread of two seeds" in printed
    assert (root / "fp8.html").read_text().count("<polyline") == 3

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import curves

    level, step = [2.0] * 40, [2.0] * 20 + [3.0] * 20  # the mean over 20 of the latter rises by 0.05 a step
    far = curves.spread({"bf16": level, "other": [2.1] * 40, "fp8": step})
    assert far.fp8_largest == pytest.approx(1) and far.fp8_mean == pytest.approx(10.5 / 21)
    assert far.seed_mean == far.seed_largest == pytest.approx(0.1) and not far.within
    assert "fp8 is not within" in curves.verdict(far)
    assert curves.spread({"bf16": level, "other": step, "fp8": [2.1] * 40}).within


def test_no_curve_is_trained_where_another_cannot_be(root, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import curves

    monkeypatch.setattr(curves, "train_variant", lambda *_, **__: pytest.fail("trained"))
    file = str(root / "tiny.yaml")
    experiment = curves.Experiment(config_file=file, overrides=[], ds_tree=ds_tree(stage=1), steps=3)
    with pytest.raises(ValueError, match=r"tiny.yaml: .*width = 24: .* takes multiples of 16"):
        curves.measure_curves(experiment, curves.fp8_and_seeds(file, []))


@pytest.mark.parametrize("enabled", ["auto", True, False])
def test_rows_compute_in_what_their_names_say(root, monkeypatch, enabled):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from variants import BASELINES, BF16, FP8, Experiment

    tree = ds_tree(stage=1, bf16=enabled)
    overrides = ["model.video.width=32"]
    one = Experiment(config_file=str(root / "tiny.yaml"), overrides=overrides, ds_tree=tree, steps=3)
    named = [row for row in (*BASELINES, BF16, FP8) if re.search(r"bf16|fp8|fp32", row.name)]
    assert len(named) == 4
    for row in named:
        assert one.configs(row)[1].bf16 == ("fp32" not in row.name), row.name


def test_spoiled_shards_are_slower_by_a_figure(root):
    _, figures = call(root, "spoiled")
    slower = [name for name in figures if name.endswith("slower by %")]
    assert len(slower) == 3 and "spoiled 50.0 %, slower by %" in slower
    clean = figures["spoiled 0.0 % clips/s"]
    half = figures["spoiled 50.0 % clips/s"]
    assert figures["spoiled 50.0 %, slower by %"] == pytest.approx(100 * (1 - half / clean))


def test_spoiling_spoils_whole_samples(root, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from loader_inputs import spoil_frames

    tars = sorted((root / "train").glob("*.tar"))
    assert spoil_frames(tars, root / "half", 0.5) == 0.5
    changed = []
    for before in ShardSet(tars):
        after = next(s for s in ShardSet(sorted((root / "half").glob("*.tar"))) if s.key == before.key)
        assert after.captions() == before.captions()
        names = before.frame_extensions()
        changed.append(sum(before.read(name) != after.read(name) for name in names))
    assert sorted(changed) == 12 * [0] + 12 * [4]


def test_step_and_its_parts(root):
    called = time.time()
    printed, rows = call(root, "step", "--report", str(root / "step.html"))
    assert [row["name"] for row in rows] == [
        "as configured",
        "eager, SDPA",
        "as published, bf16",
        "as published, fp32",
    ]
    assert all(row["clips_per_second"] > 0 and row["batch"] == 4 for row in rows)
    tree = tiny_config(root)
    flops = training_flops(tree.model, tree.method, tree.data.frames_per_clip, tree.data.caption_tokens)
    for row in rows:
        assert row["tflops_per_second"] == pytest.approx(row["clips_per_second"] * flops / 1e12)
    started, *others = (row["start_seconds"] for row in rows)
    assert 0 < started < time.time() - called and others == [None] * 3
    assert 0 < rows[0]["start_phases"]["building the engine"] < started and rows[1]["start_phases"] is None
    assert f"{rows[2]['clips_per_second']:.2f}" in printed and f"{started:.2f}" in printed
    page = (root / "step.html").read_text()
    assert f"{rows[1]['clips_per_second']:,.1f}" in page and "Training step" in page


def test_a_profile_names_the_host_operators(root):
    printed = throughput(root, "step", "--profile", "2", "--json", str(root / "parts.json"))
    assert "host, profiled" in printed and "aten::" in printed
    assert "parts" in json.loads((root / "parts.json").read_text())


def test_the_encoder_alone(root, monkeypatch):
    _, rows = call(root, "model")
    assert [row["name"] for row in rows] == ["as configured", "eager, SDPA", "as published, fp32"]
    for row in rows:
        assert row["clips_per_second"] == pytest.approx(4000 / row["milliseconds"])
        assert row["tflops_per_second"] > 0 and row["mfu"] is row["joules_per_clip"] is None

    _, rows = call(root, "model", "--alone")
    assert [row["name"] for row in rows] == ["as configured"]

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import model_speed

    drawn = iter((1000.0, 1024.0))  # by 3 passes of 4 clips
    monkeypatch.setattr(model_speed, "joules", lambda: next(drawn))
    config = tiny_config(root)
    way = ("sdpa", torch.float32, config.run)
    row = model_speed._measure(config, 4, 3, torch.device("cpu"), "made up", *way)
    assert row.joules_per_clip == 2 and model_speed.table([row]).endswith("2.00")


def test_energy_and_clock_are_those_between_the_warm_up_and_the_last_batch(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import energy

    asked, ended, last = 0, threading.Event(), 7

    def clock(*_):
        if asked == 0 or asked > last:
            ended.set()  # too early, or too late
        return 1000 + asked

    driver = SimpleNamespace(nvmlDeviceGetClockInfo=clock, NVML_CLOCK_SM=1)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(energy, "driver_handle", lambda: "GPU")
    monkeypatch.setattr(energy, "joules", lambda: 10.0 * asked)

    def batches(first_step):
        while True:
            yield first_step

    meter = energy.EnergyMeter(3, last + 1)
    with contextlib.closing(meter.deal(SimpleNamespace(batches=batches), 0)) as dealt:
        for _ in range(last + 3):
            assert next(dealt) == 0
            time.sleep(3 * energy.SECONDS_BETWEEN_CLOCKS)
            asked += 1
    assert meter.joules_per_batch == 10 and 1003 <= meter.megahertz <= 1006.5 and not ended.is_set()


def test_ablations_change_one_thing_each(root, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import throughput
    import variants

    overrides = ["run.precision=fp8", "model.video.width=32"]
    kept = variants.ablations(str(root / "tiny.yaml"), overrides)
    names = ["bf16 linear layers", "SDPA for the attention ops", "one reading process"]
    assert [one.name for one in kept if one.overrides] == names  # neither compiled nor in graphs here

    assert "bf16 linear layers" not in [one.name for one in variants.ablations(str(root / "tiny.yaml"), [])]
    each = [kept[0], *(next(one for one in kept[1:] if getattr(one, kind)) for kind in ("plain_ops", "ds"))]
    monkeypatch.setattr(variants, "ABLATIONS", each)
    files = ["--config", str(root / "tiny.yaml"), "--ds_config", str(root / "ds.json")]
    options = ["--ablate", "--batches", "1", "--json", str(root / "ablate.json")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "step", *files, *options, *overrides])
    assert throughput.main() == 0
    rows = json.loads((root / "ablate.json").read_text())["step"]
    assert [row["name"] for row in rows] == ["as configured", *(one.name for one in each)]
    assert all(row["clips_per_second"] > 0 for row in rows)


def test_all_of_it_on_one_page(root):
    timing = {"op": "space_attention", "case": "64x4", "forward_gb_per_second": 2000.0}
    timings = [
        {**timing, "implementation": "miles_fast", "forward_tflops_per_second": 100.0},
        {**timing, "implementation": "sdpa", "forward_tflops_per_second": 1000.0},
        {**timing, "op": "token_gather", "implementation": "miles_fast", "forward_tflops_per_second": None},
    ]
    # The ridge is at 100 FLOPs a byte, on axes of 10 to 1000 FLOPs a byte and of decades of TFLOP/s.
    micro = {"copy_gb_per_second": 10000.0, "product_tflops_per_second": 1000.0, "timings": timings}
    (root / "micro.json").write_text(json.dumps(micro))
    page, options = root / "all.html", ("--rival-seconds", "0.2", "--micro", str(root / "micro.json"))
    throughput(root, "all", "--alone", *options, "--report", str(page), "--json", str(root / "all.json"))
    found, text = json.loads((root / "all.json").read_text()), page.read_text()
    assert {"model", "step", "loader"} <= found.keys() and len(found["step"]) == 1
    for rate in (found["model"][1], found["step"][0], found["loader"]):
        assert f"{rate['clips_per_second']:,.1f}" in text
    assert f"{found['loader']['decoding_milliseconds']:,.1f}" in text and "Loader by stage" in text
    assert "Training step, as configured" in text and "product 1,000 TFLOP/s" in text
    (roof,) = re.findall(r'<polyline class="line s3" points="(.*?)"', text)
    start, ridge, end = (tuple(map(float, corner.split(","))) for corner in roof.split())
    assert ridge[1] == end[1] and ridge[0] == pytest.approx((start[0] + end[0]) / 2)
    points = re.findall(r'<circle class="dot( first)?" cx="(.*?)" cy="(.*?)"', text)
    assert [ours for ours, *_ in points] == [" first", ""] and ">space_attention</text>" in text
    # 100 TFLOP/s of 2 TB/s: 50 FLOPs a byte, a fifth of what the roof has there; 500 with the product's.
    (_, x, y), (_, other_x, other_y) = points
    assert (float(x), float(other_x)) == pytest.approx(
        tuple(start[0] + (end[0] - start[0]) * share for share in (log10(5) / 2, log10(50) / 2)), abs=0.2
    )
    assert float(other_y) == end[1] < float(y)


def test_a_row_that_fails_loses_no_other(root, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import throughput
    import variants

    from miles_fast.training import loop

    step, tried, held = loop.train_step, [], []

    def narrow(engine, snapshot, batch, **options):
        clips = len(batch.video_BTCHW)
        tried.append(clips)
        assert not any(one() is not None for one in held), "the last try's tensors are still there"
        if clips > fits:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("made up")
        return step(engine, snapshot, batch, **options)

    monkeypatch.setattr(loop, "train_step", narrow)
    impossible = variants.Variant(name="of no model", overrides=("run.x=1",))
    monkeypatch.setattr(variants, "BASELINES", (impossible,))
    files = ["--config", str(root / "tiny.yaml"), "--ds_config", str(root / "ds.json")]
    options = ["--batches", "1", "--json", str(root / "fails.json"), "--report", str(root / "fails.html")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "step", *files, *options])

    fits = 2
    assert throughput.main() == 1
    configured, failed = json.loads((root / "fails.json").read_text())["step"]
    assert configured["start_seconds"] is None  # another batch was tried before
    assert configured["batch"] == 2 and configured["clips_per_second"] > 0 and tried == [4] + [2] * 6
    assert failed.keys() == {"name", "batch", "error"} and "run.x" in failed["error"]
    assert f"{configured['clips_per_second']:.2f}" in (printed := capsys.readouterr().out)
    assert "of no model" in printed and "run.x" in printed
    assert f"{configured['clips_per_second']:,.1f}" in (root / "fails.html").read_text()

    fits, tried[:] = 0, []
    experiment = variants.Experiment(config_file=files[1], overrides=[], ds_tree=ds_tree(stage=1), steps=3)
    (failed,) = variants.measure_variants([variants.CONFIGURED], experiment)
    assert tried == [4, 2, 1] and failed.batch == 1 and "out of memory" in failed.error
    assert "out of memory" in variants.table([failed])

    monkeypatch.setattr(variants, "_free_memory", lambda: 61.0)
    tried[:] = []
    (failed,) = variants.measure_variants([variants.CONFIGURED], experiment)
    assert tried == [4] and failed.batch == 4 and "keeps 61 GiB: measure a smaller batch" in failed.error


def test_no_weight_of_a_row_is_there_in_the_next(root, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import variants

    from miles_fast.training import loop

    build, weights = loop.build_engine, []

    def build_engine(*arguments):
        assert not any(weight() is not None for weight in weights)
        engine = build(*arguments)
        weights.extend(weakref.ref(weight) for weight in engine.module.parameters())
        return engine

    monkeypatch.setattr(loop, "build_engine", build_engine)
    tree = ds_tree(stage=1, bf16=True) | FLOAT32_SUMS
    experiment = variants.Experiment(
        config_file=str(root / "tiny.yaml"), overrides=[], ds_tree=tree, steps=variants.WARMUP + 1
    )
    rows = variants.measure_variants([variants.CONFIGURED] * 2, experiment)
    assert [type(row) for row in rows] == [variants.Row] * 2 and len(weights) > 100


def test_plain_ops_keep_no_tensor(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from variants import ops

    from miles_fast.kernels import token_gather

    rows = torch.zeros(2, 4, 8)
    with ops(plain=("token_gather",)):
        token_gather.token_gather(rows, torch.arange(3).expand(2, 3).contiguous())
        rows = weakref.ref(rows)
        assert rows() is None


def test_plain_ops_are_all_that_have_a_kernel_but_attention(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from variants import ABLATIONS, PLAIN_OPS

    files = (BENCHMARKS.parent / "kernels").glob("*.py")
    deciding = {file.stem for file in files if re.search(r"runs_triton\(|quack_for\(", file.read_text())}
    attention = {name for name in deciding if name.endswith("_attention")}
    assert set(PLAIN_OPS) == deciding - attention - {"dispatch", "biased_gelu"}
    assert sorted(op for one in ABLATIONS for op in one.plain_ops) == sorted(PLAIN_OPS)


@pytest.mark.timeout(700)  # three runs by DeepSpeed's launcher
def test_scaling_runs_on_so_many_ranks_and_can_be_planned_from(root, monkeypatch):
    counts = [1, 2] if os.environ.get("MILES_FAST_FAULTS") == "full" else [2]  # each takes a launch
    options = ("run.log_every=1", "--singles", "--gpus", *map(str, counts))
    printed, rows = call(root, "scaling", *options, timeout=650)
    assert [row["gpus"] for row in rows] == counts and rows[0]["ratio"] == 1
    for row in rows:  # 4 clips on each rank
        expected = 4000 * row["gpus"] / row["step_milliseconds"]
        assert row["clips_per_second"] == pytest.approx(expected, rel=0.3)
        assert row["ratio"] == row["clips_per_second"] / rows[0]["clips_per_second"]
        assert len(row["alone"] or [0]) == row["gpus"] and all(row["alone"] or [1])
        assert f"{row['gpus']:>5}{row['clips_per_second']:>12.2f}{row['ratio']:>8.3f}" in printed
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "launch"))
    import plan

    file, settings = root / "scaling.json", SimpleNamespace(batch=4, accumulation=1)
    planned = plan.Planned(
        config=tiny_config(root), config_file="tiny.yaml", settings=settings, ds_config="ds.json"
    )
    gpus, measured = plan._measurement(f"2={file}", planned)
    assert gpus == 2 and measured.clips_per_second == rows[-1]["clips_per_second"]
    assert measured.step_seconds == 8 / rows[-1]["clips_per_second"]
    with pytest.raises(ValueError, match="holds no clips_per_second above 0 of 3 GPUs"):
        plan._measurement(f"3={file}", planned)
    assert json.loads(file.read_text())["quack"] is False
    other = replace(planned, config=tiny_config(root, model={"embedding": 32}))
    with pytest.raises(ValueError, match="scaling.json: measured with another .* model.embedding: 16 -> 32"):
        plan._measurement(f"2={file}", other)


def test_what_saves_cost(root, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import throughput
    from saves import Span, summary

    files = ["--config", str(root / "tiny.yaml"), "--ds_config", str(root / "ds.json")]
    options = ["--batches", "40", "--saves", "2", "run.save_every=1000", "--json", str(root / "saves.json")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "saves", *files, *options])
    throughput.main()
    found = json.loads((root / "saves.json").read_text())["saves"]
    assert found["saves"] == 2 and found["gib"] > 0 and found["save_every"] == 1000
    assert found["slower"] == pytest.approx(found["lost_milliseconds"] / found["free_milliseconds"] / 1000)
    assert f"{found['writing_seconds']:.2f}" in capsys.readouterr().out

    # Steps of 1 s; a save begins in the fourth, the next waits for its copy, it is written until the ninth.
    lengths = [1, 1, 1, 1.5, 2, 1.2, 1.2, 1.2, 1.2, 1, 1]
    dealt = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    found = summary(dealt, [Span(began=dealt[3] + 1, ended=dealt[8] + 0.5)], gib=1.0, save_every=10)
    assert found.free_milliseconds == 1000 and found.beside_milliseconds == pytest.approx(1200)
    assert found.copy_milliseconds == pytest.approx(1500) and found.lost_milliseconds == pytest.approx(2300)
    assert found.slower == pytest.approx(0.23)
    with pytest.raises(ValueError, match="take more --batches"):
        summary(dealt, [Span(began=0.0, ended=99.0)], gib=1.0, save_every=10)


def test_the_doctor_examines_and_says_something(root):
    printed, figures = call(root, "doctor", "run.steps=8")
    assert "step on synthetic data" in printed and "bottleneck" in printed or "No stage alone" in printed
    assert figures["loader"]["takes"] == "jpeg" and figures["real_clips_per_second"] > 0


def healthy(doctor):
    stages = doctor.LoaderFigures(
        clips_per_second=4000.0,
        frames_per_second=8000.0,
        megabytes_per_second=100.0,
        batch_milliseconds=1.0,
        reading_milliseconds=1.0,
        decoding_milliseconds=1.0,
        growth_mib_per_thousand=0.0,
        batch_bytes=2_000_000,
        takes="jpeg",
    )
    return doctor.Examination(
        loader=stages,
        cold_milliseconds=1.0,
        transfer_milliseconds=0.1,
        synthetic_clips_per_second=400.0,
        cached_clips_per_second=400.0,
        real_clips_per_second=399.0,
    )


# The step takes 10 ms a batch of 4 at 400 clips/s.
@pytest.mark.parametrize(
    "stage, real, expected",
    [
        ({}, 399.0, ["The step itself is the bottleneck", "10.0 times"]),
        ({"reading_milliseconds": 25.0}, 160.0, ["Reading", "60 %", "data.decode_workers from 2 to 5"]),
        (
            {"reading_milliseconds": 25.0, "takes": "pixels"},
            160.0,
            ["Reading", "prepare frames once (launch/prepare.py)"],
        ),
        ({"decoding_milliseconds": 20.0}, 200.0, ["Decoding", "50 %", "data.threads from 1"]),
        ({}, 300.0, ["No stage alone is slower", "25 %", "cores"]),
    ],
)
def test_the_doctor_names_the_slowest_stage(root, doctor, stage, real, expected):
    found = healthy(doctor)
    found = replace(found, loader=replace(found.loader, **stage), real_clips_per_second=real)
    said = doctor.verdict(found, tiny_config(root), 4)
    assert all(part in said for part in expected), said


@pytest.mark.parametrize("decoder", ["cpu", "nvjpeg"])
def test_the_doctor_names_the_decoder_that_a_gpu_has(root, doctor, decoder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = healthy(doctor)
    slow = replace(found.loader, decoding_milliseconds=20.0)
    found = replace(found, loader=slow, real_clips_per_second=200.0)
    said = doctor.verdict(found, tiny_config(root, data={"jpeg_decoder": decoder}), 4)
    assert ("set data.jpeg_decoder=nvjpeg" in said) == (decoder == "cpu"), said


def test_the_doctor_tells_a_slow_disk_from_slow_reading(root, doctor):
    found = replace(healthy(doctor), cold_milliseconds=40.0, real_clips_per_second=100.0)
    said = doctor.verdict(found, tiny_config(root), 4)
    assert "Storage is the bottleneck" in said and "50 MB/s, and the step needs 200" in said
