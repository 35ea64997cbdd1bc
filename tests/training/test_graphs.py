"""CUDA graphs of the passes: the same numbers, and a host that does not wait."""

import warnings
from pathlib import Path

import pytest
import torch
from tiny import FLOAT32_SUMS, ds_tree, tiny_config, write_data
from torch._dynamo.backends.debugging import aot_eager_decomp_partition

from miles_fast.config import ConfigError
from miles_fast.models.dual_encoder import build_dual_encoder
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.graphs import sample_inputs
from miles_fast.training.loop import pretrain
from miles_fast.training.objective import Objective
from miles_fast.training.progress import read_log
from miles_fast.training.start import compile_passes

# Large enough for its activations to be most of the memory.
DEEP = {"video": {"image_size": 128, "patch_size": 8, "width": 192, "depth": 8, "heads": 6, "num_frames": 2}}
VIEW_D = {"view": "D", "mask": {"ratio": 0.75, "kind": "tube_random"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("graphs")
    write_data(place)
    return place


def train(root, name, method, *, steps=6, resume=None, deal=None, model=None, stage=1, **run):
    run = {"folder": str(root / name), "steps": steps, "log_every": 1, "save_every": 3, **run}
    config = tiny_config(root, run=run, method=method, model=model or {})
    tree = ds_tree(stage=stage, batch=4, bf16=True)
    if stage == 1:
        tree |= FLOAT32_SUMS
    tree["zero_optimization"]["reduce_bucket_size"] = 10**6  # DeepSpeed's default takes a GiB
    settings = check_ds_config(tree, "ds", config, cuda=True, ranks=1)
    pretrain(config, settings, resume=resume, **({"deal": deal} if deal else {}))
    names = ("step", "loss", "regression", "gradient_norm", "target_cosine", "target_std")
    return [[r.get(name) for name in names] for r in read_log(root / name) if "loss" in r]


@pytest.mark.gpu
@pytest.mark.parametrize("view", ["A", "B", "D", "none"])
def test_graphs_compute_what_the_operators_do(root, view):
    method = VIEW_D if view == "D" else {"view": view}
    launched = train(root, f"operators {view}", method, cuda_graphs=False)
    replayed = train(root, f"graphs {view}", method, cuda_graphs=True)
    assert len(launched) == 6 and launched[0][1] != launched[-1][1]
    assert replayed == launched


@pytest.mark.gpu
def test_a_resumed_run_of_graphs_equals_one_that_went_on(root):
    whole = train(root, "whole", {"view": "A"}, cuda_graphs=True)
    checkpoint = next((root / "whole" / "checkpoints").glob("*3"))
    halves = train(root, "halves", {"view": "A"}, cuda_graphs=True, resume=str(checkpoint))
    assert halves == whole[3:]


@pytest.mark.gpu
@pytest.mark.parametrize(("view", "stage", "waits"), [("A", 1, 4), ("B", 1, 4), ("D", 1, 4), ("A", 2, 8)])
def test_the_host_waits_for_the_gpu_in_deepspeeds_norm_only(root, view, stage, waits):
    """One after the other, behind the last gradient: is the norm finite, and is it to be clipped?"""
    seen = []

    def same_batch(loader, first_step):
        batches = loader.batches(first_step)
        batch = next(batches)
        batches.close()  # what its threads wait for is not the step's
        while True:
            seen.append(len(caught))
            yield batch

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(
                root,
                f"waits {view} {stage}",
                VIEW_D if view == "D" else {"view": view},
                steps=9,
                log_every=100,
                save_every=100,
                deal=same_batch,
                cuda_graphs=True,
                stage=stage,
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steady = [w for w in caught[seen[4] : seen[8]] if "synchronizing CUDA operation" in str(w.message)]
    places = {"/".join(Path(w.filename).parts[-3:]) + f":{w.lineno}" for w in steady}
    assert all("deepspeed" in w.filename for w in steady), places
    assert 4 <= len(steady) <= 4 * waits, places


@pytest.mark.parametrize("view", ["A", "none"])
def test_graphs_are_captured_of_what_the_loader_gives(root, view):
    dealt = []

    def deal(loader, first_step):
        for batch in loader.batches(first_step):
            dealt.append(batch)
            yield batch

    config = tiny_config(root, run={"folder": str(root / "shapes"), "steps": 1}, method={"view": view})
    settings = check_ds_config(ds_tree(), "ds", config, cuda=False, ranks=1)
    pretrain(config, settings, deal=deal)
    batch = dealt[0]
    given = [batch.video_BTCHW, batch.token_ids_BL, batch.attention_BL, batch.masked_BM]
    samples = sample_inputs(config, settings.batch, batch.video_BTCHW.device)
    described = [[(t.shape, t.dtype) for t in tensors if t is not None] for tensors in (given, samples)]
    assert described[0] == described[1] and len(samples) == (3 if view == "none" else 4)


@pytest.mark.gpu
def test_a_memory_budget_changes_memory_and_no_number(root):
    def deal(loader, first_step):
        for number, batch in enumerate(loader.batches(first_step)):
            if number == 1:  # choosing kernels in the first step takes more memory than the model
                torch.cuda.reset_peak_memory_stats()
                held.append(torch.cuda.memory_allocated())
            yield batch

    held, peaks, losses = [], [], []
    for budget in (1.0, 0.2):
        torch._dynamo.reset()
        run = {"compile": True, "activation_memory_budget": budget}
        rows = train(root, f"budget {budget}", {"view": "A"}, steps=3, deal=deal, model=DEEP, **run)
        peaks.append(torch.cuda.max_memory_allocated() - held[-1])
        losses.append([row[1] for row in rows])
    assert peaks[1] < 0.75 * peaks[0], peaks
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_a_memory_budget_leaves_the_gradients_as_they_are(root, monkeypatch):
    """With dropout: torch computes a recomputed one's gradient of other random numbers (pytorch #190758).

    What is kept is chosen before code is generated, which takes minutes on a CPU and is left out here.
    """
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager_decomp_partition)

    def gradients(budget):
        torch._dynamo.reset()
        torch.manual_seed(0)
        objective = Objective(build_dual_encoder(config.model, 40), config.method, 2).train()
        compile_passes(objective, None, budget)
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            objective(*inputs).total.backward()
        return sum(saved), {name: weight.grad for name, weight in objective.named_parameters()}

    config = tiny_config(root, method={"view": "A"})
    assert config.model.text.dropout > 0
    video, token_ids, attention, masked = sample_inputs(config, 4, torch.device("cpu"))
    target = torch.randn(4, masked.shape[1], config.model.video.width)
    inputs = torch.randn(video.shape), token_ids + torch.arange(8), attention, masked, target
    (kept, want), (kept_less, got) = gradients(1.0), gradients(0.2)
    assert kept_less < kept
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_memory_budget_needs_the_compiler(root):
    with pytest.raises(ConfigError, match=r"activation_memory_budget = 0.5 needs run.compile"):
        tiny_config(root, run={"folder": "x", "steps": 1, "activation_memory_budget": 0.5})


def test_zero_3_is_refused(root):
    config = tiny_config(root, run={"folder": str(root / "three"), "steps": 1, "cuda_graphs": True})
    with pytest.raises(ConfigError, match="run.cuda_graphs: false"):
        check_ds_config(ds_tree(stage=3), "ds", config, cuda=True, ranks=1)
