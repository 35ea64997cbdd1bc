"""What benchmarks/micro.py makes of its times, where the times are made up."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miles_fast.kernels import attention_cases, token_cases
from miles_fast.kernels.divided_attention import divided_attention_reference

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASE = token_cases.FEATURE_REGRESSION_SMALL[0]


@pytest.fixture
def micro(monkeypatch):
    """The program on the CPU: forward takes 1 ms, forward and backward 3, and NaN are not captured."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import micro

    def median_ms(call, *, graph=True):
        result = call()
        if graph and call.__name__ == "both" and result[0].isnan().any():
            raise RuntimeError("operation not permitted when stream is capturing")
        return 3.0 if call.__name__ == "both" else 1.0

    monkeypatch.setattr(micro, "DEVICE", "cpu")
    monkeypatch.setattr(micro, "median_ms", median_ms)
    monkeypatch.setattr(micro, "peak_mib", lambda call: 0.0)
    monkeypatch.setattr(micro, "copy_gb_per_second", lambda: 10.0)
    monkeypatch.setattr(micro, "product_tflops_per_second", lambda: 20.0)
    for name, answer in (("is_available", True), ("get_device_name", "made up"), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    return micro


def timed(micro, monkeypatch, tmp_path, contest, *options):
    monkeypatch.setattr(micro, "CONTESTS", {"op": contest})
    monkeypatch.setattr(sys, "argv", ["micro.py", "--json", str(tmp_path / "micro.json"), *options])
    return micro.main(), json.loads((tmp_path / "micro.json").read_text())


def fails(*_, **__):
    raise RuntimeError("no kernel image")


def test_a_rival_that_fails_is_named_and_ends_nothing(micro, monkeypatch, tmp_path, capsys):
    contest = micro.CONTESTS["feature_regression"]

    def uncapturable(*args, **options):
        return contest.reference(*args, **options) * float("nan")

    rivals = {"fails": fails, "uncapturable": uncapturable, "eager": contest.reference}
    contest = replace(contest, rivals=rivals, trainer_cases=(CASE,))
    status, found = timed(micro, monkeypatch, tmp_path, contest)
    assert status == 0 and found["product_tflops_per_second"] == 20
    assert found["refused"] == [f"op {CASE.name}: fails: RuntimeError: no kernel image"]
    graphs = {row["implementation"]: row["graph"] for row in found["timings"]}
    assert graphs == {"miles_fast": True, "uncapturable": False, "eager": True}
    for row in found["timings"]:
        assert row["forward_share_of_copy"] == pytest.approx(CASE.forward_bytes / 1e6 / 10)
        assert row["backward_share_of_copy"] == pytest.approx(CASE.backward_bytes / 2e6 / 10)
        assert row["backward_ms"] == 2 and row["forward_tflops_per_second"] is None
    assert "| uncapturable * |" in capsys.readouterr().out

    status, found = timed(micro, monkeypatch, tmp_path, replace(contest, op=fails))
    assert status == 1 and found["timings"] == [] and "no kernel image" in found["refused"][0]


@pytest.mark.parametrize("name, axis", [("space_attention", "space"), ("temporal_attention", "time")])
def test_attention_has_the_flops_of_its_products(micro, monkeypatch, tmp_path, name, axis):
    case = attention_cases.SMALL[2]
    contest = replace(micro.CONTESTS[name], rivals={}, trainer_cases=(case,))
    _, found = timed(micro, monkeypatch, tmp_path, contest)

    # The reference multiplies all pairs of tokens; of those, the ones that are not masked count.
    tokens = 1 + case.T * case.P
    value = torch.eye(tokens, dtype=torch.float64).expand(1, tokens, tokens)
    zero = torch.zeros_like(value)
    weights = divided_attention_reference(torch.stack([zero, zero, value], 2)[:, :, :, None], case.T, axis)
    pairs = int((weights > 0).sum())
    expected = 4 * case.B * case.H * case.S * pairs
    assert found["timings"][0]["forward_tflops_per_second"] == pytest.approx(expected / 1e9)


def test_a_sweep_says_what_it_chose(micro, monkeypatch, tmp_path):
    contest = replace(micro.CONTESTS["feature_regression"], trainer_cases=(CASE,))
    now = dict(contest.tables[0].entries)
    chosen = contest.tables[0].candidates(CASE)[3]
    entries, key = contest.tables[0].entries, contest.key(CASE)
    monkeypatch.setattr(micro, "median_ms", lambda call: 1.0 if entries.get(key) == chosen else 2.0)
    status, found = timed(micro, monkeypatch, tmp_path, contest, "--sweep")
    forward, backward = found["sweeps"]
    assert status == 0 and forward["chosen"] == list(chosen) and backward["table"] == "backward"
    assert forward["now"] == (list(now[key]) if key in now else None) and entries == now
