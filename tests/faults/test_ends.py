"""F7, F9: signals, ranks that hang or are gone, memory that does not suffice."""

import json
import signal
import time
from functools import partial

import pytest
import torch
from fork_server import CPU
from tiny import ds_tree, tiny_config

from miles_fast.training import checkpoint, loop
from miles_fast.training.checkpoint import find_checkpoint
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.memory_report import OutOfMemory, memory_error, memory_report
from miles_fast.training.progress import StepLog, read_log
from miles_fast.training.signals import HUNG, STOPPED, exit_with_status

# Large enough for its activations to be most of the memory.
DEEP = {"video": {"image_size": 128, "patch_size": 8, "width": 192, "depth": 8, "heads": 6, "num_frames": 2}}
GRACE_SECONDS = 60  # what Slurm and others give a job between the signal and the kill
HANG = ("--run-keys", '{"hang_seconds": 12}')
TWO_GPUS = [pytest.mark.gpu, pytest.mark.multigpu]


def figures(run):
    names = ("step", "loss", "contrastive", "regression", "gradient_norm")
    return [[record[name] for name in names] for record in read_log(run) if "loss" in record]


@pytest.mark.parametrize(
    "kind,ranks,env",
    [("term", 2, CPU), ("usr1", 1, CPU), ("int", 1, CPU), pytest.param("term", 2, {}, marks=TWO_GPUS)],
)
def test_a_signal_ends_with_a_checkpoint_and_the_resume_is_bit_exact(
    start, tmp_path, finding, full, kind, ranks, env
):
    if not full and kind != "term":
        pytest.skip("make faults runs SIGUSR1 and SIGINT too")
    start = partial(start, env=env)
    whole = start(tmp_path / "whole", ranks, "--steps", "5")
    assert whole.wait() == [0] * ranks, whole.errors
    # Only the last rank is told; all stop after the same step.
    run = start(tmp_path / "run", ranks, "--steps", "5", "--fault", f"{kind}:2:{ranks - 1}")
    assert run.wait() == [STOPPED] * ranks, run.errors
    seconds = time.monotonic() - float((tmp_path / f"run.keys{ranks - 1}.signalled").read_text())
    assert 0 < seconds < GRACE_SECONDS
    assert "its checkpoint is complete" in run.errors[0]
    stopped = find_checkpoint(tmp_path / "run", "auto")
    assert 2 <= int(stopped.name[-2:]) < 5
    again = start(tmp_path / "run", ranks, "--steps", "5", "--resume", "auto")
    assert again.wait() == [0] * ranks, again.errors
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    for name in ("rank-00000.safetensors", "snapshot.safetensors", "student/model.safetensors"):
        files = [tmp_path / r / "checkpoints" / "step-00000005" / name for r in ("run", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
    finding("F7", f"exit code {STOPPED} {seconds:.1f} s after the signal, resumed bit-equal ({kind})")


def test_the_signal_of_ctrl_c_ends_with_a_checkpoint_and_a_second_one_at_once(start, tmp_path):
    once = start(tmp_path / "once", 1, "--steps", "99", "--fault", "int:2:0")
    twice = start(tmp_path / "twice", 1, "--steps", "99", "--fault", "int:2-3:0")
    assert once.wait() == [STOPPED] and "stopped by SIGINT after step" in once.errors[0], once.errors
    assert find_checkpoint(tmp_path / "once", "auto") is not None
    assert twice.wait() == [-signal.SIGINT] and "again ends the run at once" in twice.errors[0]
    assert find_checkpoint(tmp_path / "twice", "auto") is None
    assert not any("Traceback" in said for said in once.errors + twice.errors)


@pytest.mark.parametrize("env", [CPU, pytest.param({}, marks=TWO_GPUS)], ids=["gloo", "nccl"])
@pytest.mark.parametrize(
    "kind,step,rank,said",
    [
        ("hang", 3, 1, "rank 1 hangs while waiting for the data of step 3, at ranks.py"),
        ("hang", "start", 1, "rank 1 hangs while building the engine, at ranks.py"),
        ("die", "start", 1, "rank 1 gives no sign of life: its process is gone"),
        ("die", "start", 0, "rank 0 gives no sign of life: its process is gone"),
        ("die", 0, 1, "rank 1 gives no sign of life: its process is gone"),
        ("die", 3, 1, "rank 1 gives no sign of life: its process is gone"),
        ("die", 3, 0, "rank 0 gives no sign of life: its process is gone"),
        ("freeze", 3, 1, "rank 1 gives no sign of life: its process is gone or stopped"),
        ("freeze", 3, 0, "rank 0 gives no sign of life for 16 s: its process is gone or stopped"),
    ],
)
def test_a_rank_that_hangs_or_is_gone_is_named(start, tmp_path, finding, full, kind, step, rank, said, env):
    if not full and (kind, step, rank) not in (("hang", 3, 1), ("die", "start", 1)):
        pytest.skip("make faults runs them all")
    run = start(tmp_path / "run", 2, "--steps", "99", *HANG, "--fault", f"{kind}:{step}:{rank}", env=env)
    began = time.monotonic()
    codes = run.wait(timeout=200, besides=(rank,) if kind in ("die", "freeze") else ())
    seconds = time.monotonic() - began
    other = 1 - rank
    assert codes[other] == HUNG, run.errors[other]
    assert said in run.errors[other], run.errors[other]
    what = f"{kind} of rank {rank} at step {step}"
    finding("F9", f"{what}: named, all ended {seconds:.0f} s after the start (limit 12 s)")


@pytest.mark.parametrize("failing,saved", [((0, 1), 5), ((1,), 5), ((0,), 3)])
def test_an_evaluation_that_fails_leaves_a_checkpoint_where_all_ranks_notice(start, tmp_path, failing, saved):
    """Rank 0 completes a checkpoint: it cannot wait for ranks that wait for it."""
    fails = ("--evaluation-fails-on", *map(str, failing))
    run = start(tmp_path / "run", 2, "--steps", "5", *HANG, *fails)
    codes = run.wait(timeout=100)
    for rank, (code, said) in enumerate(zip(codes, run.errors, strict=True)):
        assert code == (1 if rank in failing else HUNG), said
        assert ("ValueError: the evaluation fails" in said) == (rank in failing)
    assert find_checkpoint(tmp_path / "run", "auto").name == f"step-0000000{saved}"
    assert ("the checkpoint of that step is complete" in run.errors[0]) == (saved == 5)
    assert "not all ranks had written their part" in run.errors[0] or saved == 5


class QuackError(Exception):
    """Its errors are no RuntimeErrors."""


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    QuackError("DSLCudaRuntimeError: CUDA_ERROR_OUT_OF_MEMORY (error code: 2)"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.distributed.DistBackendError(
        "unhandled cuda error\nLast error:\nFailed to CUDA calloc 8388608 bytes"
    ),
    MemoryError("CUDA allocation failed"),
)


@pytest.mark.parametrize(
    "where,error",
    [
        *((where, NO_MEMORY[0]) for where in ("build_engine", "Saver")),
        *(("train_step", e) for e in NO_MEMORY),
    ],
)
def test_memory_that_does_not_suffice_is_reported(root, tmp_path, monkeypatch, finding, where, error):
    def full(*rest, **options):
        try:
            raise error
        finally:
            if where == "Saver":  # what a capture that broke off ends with
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(loop, where, full)
    config = tiny_config(root, run={"folder": str(tmp_path / "run")})
    settings = check_ds_config(ds_tree(stage=1, batch=4), "ds", config, cuda=False, ranks=1)
    with pytest.raises(OutOfMemory) as caught:
        loop.pretrain(config, settings)
    text = str(caught.value)
    assert f"rank 0 ran out of memory.\n{' '.join(str(error).split())}\n" in text
    assert "optimizer moments" in text and "snapshot" in text
    assert "train_micro_batch_size_per_gpu 4 -> 2 with gradient_accumulation_steps 1 -> 2" in text
    assert "zero_optimization.stage 1 -> 2" in text
    finding("F9", "out of memory: a table by use and the settings to lower, in order")


@pytest.mark.parametrize(
    "said", ["cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"]
)
def test_what_a_full_gpu_says_is_of_memory_only_there(monkeypatch, said):
    """ViT-H of 36 clips a GPU at ZeRO 1: no room was left for cuDNN's kernels, of which it says only this."""
    error = RuntimeError(said)

    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def found(gpu, room):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "mem_get_info", room)
        return memory_error(error)

    assert found(True, lambda: (2**27, 80 * 2**30)) is error
    assert found(True, lambda: (2**32, 80 * 2**30)) is None
    assert found(True, fails) is None and found(False, fails) is None


def test_what_is_to_be_lowered_can_be(root):
    """A batch of one clip cannot, ZeRO 3 has no next stage; 1e9 is DeepSpeed's default."""

    def advice(**keys):
        tree = ds_tree(stage=3, batch=1)
        tree["zero_optimization"] |= keys
        settings = check_ds_config(tree, "ds", tiny_config(root), cuda=False, ranks=2)
        report = memory_report(MemoryError("full"), None, None, None, settings, torch.device("cpu"))
        return report.partition("Lower, in this order:\n")[2].splitlines()

    first, *rest = advice()
    assert "stage3_max_live_parameters 1000000000 -> 100000000" in first
    assert rest == advice(stage3_max_live_parameters=1e8) and "activation_memory_budget" in rest[0]


def test_others_on_the_gpu_are_named_first(root):
    """In torch's words of 2.11 on an H100 that two runs shared."""
    others = "Process 16558 has 72.14 GiB memory in use. Process 7 has 512.00 MiB memory in use. "
    said = (
        f"CUDA out of memory. {others}Including non-PyTorch memory, this process has 7.00 GiB memory in use."
    )
    settings = check_ds_config(ds_tree(stage=1, batch=4), "ds", tiny_config(root), cuda=False, ranks=1)
    report = memory_report(torch.OutOfMemoryError(said), None, None, None, settings, torch.device("cpu"))
    first, second, *_ = report.partition("Lower, in this order:\n")[2].splitlines()
    assert first.endswith("process 16558 has 72.14 GiB of it") and second.endswith("7 has 512.00 MiB of it")


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["capture_passes", "train_step"])
def test_a_gpu_without_memory_ends_the_program_with_a_table(root, tmp_path, monkeypatch, limit_memory, where):
    """The limit is set when the engine is there."""
    do = getattr(loop, where)

    def limited(*rest, **options):
        limit_memory(2**26)
        torch.cuda.reset_peak_memory_stats()
        return do(*rest, **options)

    def main():
        loop.pretrain(config, settings)

    monkeypatch.setattr(loop, where, limited)
    run = {"folder": str(tmp_path / "run"), "cuda_graphs": where == "capture_passes"}
    config = tiny_config(root, run=run, model=DEEP)
    tree = ds_tree(stage=1, batch=24, bf16=True)
    tree["zero_optimization"]["reduce_bucket_size"] = 10**6  # DeepSpeed's default takes a GiB
    settings = check_ds_config(tree, "ds", config, cuda=True, ranks=1)
    with pytest.raises(SystemExit) as ended:
        exit_with_status(main)
    said = str(ended.value.code)  # a text: Python prints it and exits with 1
    assert said.startswith("error: rank 0 ran out of memory.\n"), said
    gib = {row[:42].strip(): float(row[42:].split()[0]) for row in said.splitlines() if row.endswith(" GiB")}
    assert 0 < gib["allocated at the peak"] < gib["on the device"] and gib["float32 weights"] > 0
    assert "train_micro_batch_size_per_gpu 24 -> 12" in said


def test_memory_that_ends_while_restoring_is_not_a_damaged_checkpoint(root, tmp_path, monkeypatch):
    def full(*rest):
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = tiny_config(root, run={"folder": str(tmp_path / "run"), "steps": 1})
    settings = check_ds_config(ds_tree(stage=1), "ds", config, cuda=False, ranks=1)
    loop.pretrain(config, settings)
    monkeypatch.setattr(checkpoint, "load_state", full)
    with pytest.raises(OutOfMemory, match="rank 0 ran out of memory"):
        loop.pretrain(config, settings, resume="auto")


def test_a_failed_save_can_be_gone_on_from(root, tmp_path, monkeypatch):
    write, tries = loop.Saver._write, []

    def fails_once(saver, name, *rest):
        tries.append(name)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        write(saver, name, *rest)

    monkeypatch.setattr(loop.Saver, "_write", fails_once)
    run = {"folder": str(tmp_path / "run"), "steps": 6, "save_every": 2, "on_save_error": "continue"}
    config = tiny_config(root, run=run)
    settings = check_ds_config(ds_tree(), "ds", config, cuda=False, ranks=1)
    loop.pretrain(config, settings)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "step-00000002" not in names and (tmp_path / "run" / "checkpoints" / "latest").read_text() == (
        "step-00000006\n"
    )
    assert json.loads((tmp_path / "run" / "checkpoints" / names[-1] / "state.json").read_text())["step"] == 6


def test_a_log_that_a_full_disk_cut_off_is_gone_on_with(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    StepLog(tmp_path, 2, 9).close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:2])
    (tmp_path / "log.jsonl").write_text(lines[0] + '{"step": 2')
    log = StepLog(tmp_path, 2, 9)
    log.write(3, {"loss": 0.25})
    log.close()
    assert [record["step"] for record in read_log(tmp_path)] == [1, 3]
