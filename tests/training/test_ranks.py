"""Two ranks against one on the joined batch; ZeRO 0 to 3 against each other: gloo, and NCCL on two GPUs."""

import json
from pathlib import Path

import numpy as np
import pytest
from fork_server import CPU, Ranks
from tiny import write_data

pytestmark = pytest.mark.timeout(700)  # the fixture starts three programs, which import and compile on a GPU
SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.fixture(
    scope="module",
    params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.multigpu])],
)
def results(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("ranks")
    write_data(root)
    found = {}
    for ranks, batch, runs in ((1, 6, "1,1x2"), (2, 3, "0,1,2,3,3x2,1b,3b")):
        output = root / f"out{ranks}"
        output.mkdir()
        command = (str(SCRIPT), str(root), str(output), str(batch), runs)
        run = Ranks(ranks, *command, env=CPU if request.param == "cpu" else {})
        run.finish(280)
        found[ranks] = [json.loads((output / f"rank{r}.json").read_text()) for r in range(ranks)]
        assert {result["device"] for result in found[ranks]} == {request.param}
    return found


def test_what_a_failed_rank_said_last_is_shown(tmp_path):
    """And that the other one, which would wait for ever, was not waited for."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, time\n"
        "print('noise\\n' * 999, file=sys.stderr)\n"
        "time.sleep(99) if os.environ['RANK'] == '0' else sys.exit('error: why')\n"
    )
    with pytest.raises(AssertionError) as failed:
        Ranks(2, str(script), env=CPU).finish(60)
    hangs, says = str(failed.value).split("rank 1 ended with 1:\n")
    assert hangs.startswith("rank 0 did not end:") and says.endswith("noise\n\nerror: why")
    assert len(str(failed.value).splitlines()) < 50


def test_the_contrast_of_two_ranks_has_the_gradient_of_one_on_the_joined_batch(results):
    (one,), two = ([r["contrastive gradient"] for r in results[ranks]] for ranks in (1, 2))
    assert np.abs(one).min() > 0
    for found in two:
        np.testing.assert_allclose(found, one, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.multigpu
@pytest.mark.parametrize("results", ["cuda"], indirect=True)
def test_the_gpu_computes_while_rows_of_other_ranks_travel(results):
    for found in results[2]:
        other, gathered = found["beside gather"]
        assert 0 < 3 * other < gathered


@pytest.mark.gpu
@pytest.mark.multigpu
@pytest.mark.parametrize("results", ["cuda"], indirect=True)
def test_a_rank_holds_memory_of_its_own_gpu_alone(results):
    """By the driver's ids of processes, which need not be those that the processes themselves see."""
    one, two = (set(found["processes"]) for found in results[2])
    assert one and two and not one & two


@pytest.mark.parametrize("run,same", [("1", "1"), ("3x2", "1x2")])
def test_two_ranks_equal_one_on_the_joined_batch(results, run, same):
    one, two = results[1][0][same], [r[run] for r in results[2]]
    assert [a + b for a, b in zip(two[0]["keys"], two[1]["keys"], strict=True)] == one["keys"]
    np.testing.assert_allclose(two[0]["losses"], one["losses"], rtol=2e-5)
    np.testing.assert_allclose(two[0]["norms"], one["norms"], rtol=2e-4)
    assert np.isfinite(one["norms"]).all()


def test_bf16_gradients_are_summed_flat_as_deepspeed_sums_them_one_by_one(results):
    for flat, own in ((r["bf16 flat"], r["bf16"]) for r in results[2]):
        np.testing.assert_allclose(flat["norms"], own["norms"], rtol=1e-6)
        for name, weight in own["weights"].items():
            np.testing.assert_allclose(flat["weights"][name], weight, rtol=1e-5, atol=1e-8)
    alone, joined = results[1][0]["bf16 flat"], results[2][0]["bf16 flat"]
    assert joined["norms"][0] != alone["norms"][0]  # the other rank's clips count


@pytest.mark.parametrize("run", ["0", "1", "2", "3", "3x2", "1b", "3b"])
def test_the_snapshot_is_the_average_and_computes_with_it(results, run):
    """At ZeRO 3 the ranks share the average out; 0.02 is where weights begin."""
    for found in (r[run] for r in results[2]):
        averaged, computing = found["snapshot's distances"]
        assert averaged < 1e-6
        assert 0 < computing < 4e-3 if run.endswith("b") else computing == 0


def test_ranks_agree(results):
    first, second = (r["1"] for r in results[2])
    assert first["losses"] == second["losses"]
    assert first["weights"] == second["weights"] and first["snapshot"] == second["snapshot"]


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_zero_stages_give_the_losses_and_the_snapshot_of_stage_0(results, stage):
    plain, sharded = results[2][0]["0"], results[2][0][stage]
    np.testing.assert_allclose(sharded["losses"], plain["losses"], rtol=2e-5)
    np.testing.assert_allclose(sharded["norms"], plain["norms"], rtol=2e-4)
    assert plain["losses"][-1] != plain["losses"][0]
    for part in ("weights", "snapshot"):
        assert sharded[part].keys() == plain[part].keys()
        values = np.array([[sharded[part][name], plain[part][name]] for name in plain[part]])
        np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-3, atol=5e-3)
