"""F7 under the launchers that people use: DeepSpeed's on one host, over ssh, and through Slurm."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from fork_server import LAUNCHERS, PATHS, ROOT, free_port
from tiny import ds_tree, tiny_tree

from miles_fast.training.checkpoint import find_checkpoint
from miles_fast.training.progress import read_log
from miles_fast.training.signals import HUNG, STOPPED

STEPS = 60  # some seconds: long enough to be stopped in
GRACE_SECONDS = 60  # between the signal and the kill
PROGRAM = "launch/pretrain.py"
STARTED: list[subprocess.Popen] = []


@pytest.fixture(scope="session")
def files(root) -> list[str]:
    """The config and DeepSpeed's json of a run, in the order of Slurm's arguments."""
    tree = tiny_tree(root)
    tree["run"] |= {"steps": STEPS, "save_every": STEPS}
    (root / "tiny.yaml").write_text(yaml.safe_dump(tree))
    (root / "ds.json").write_text(json.dumps(ds_tree(stage=2, batch=2)))
    return [str(root / "tiny.yaml"), str(root / "ds.json")]


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    for process in STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start(*command: str, **environment: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    every = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": PATHS,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    for name in LAUNCHERS:
        every.pop(name, None)
    # Ctrl-C is what a shell has its background ignore.
    options = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    STARTED.append(subprocess.Popen(command, cwd=ROOT, env=every | environment, **options))
    return STARTED[-1]


def deepspeed(files: list[str], run: Path, *options: str) -> subprocess.Popen:
    launcher = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), PROGRAM)
    return start(*launcher, "--config", files[0], "--ds_config", files[1], f"run.folder={run}", *options)


def ranks_of(launched: subprocess.Popen) -> list[psutil.Process]:
    below = psutil.Process(launched.pid).children(recursive=True)
    return [process for process in below if PROGRAM in process.cmdline()[1:3]]


def await_a_step(launched: subprocess.Popen, run: Path) -> None:
    limit = time.monotonic() + 120
    while not (run / "log.jsonl").is_file() or "\n" not in (run / "log.jsonl").read_text():
        assert launched.poll() is None and time.monotonic() < limit
        time.sleep(0.05)


def assert_stopped(run: Path) -> None:
    assert 0 < int(find_checkpoint(run, "auto").name[-8:]) < STEPS


def assert_same(run: Path, whole: Path) -> None:
    names = ("step", "loss", "gradient_norm", "learning_rate")
    figures = [[[r[name] for name in names] for r in read_log(f) if "loss" in r] for f in (run, whole)]
    assert figures[0] == figures[1] and len(figures[0]) == STEPS
    for file in ("rank-00000.safetensors", "rank-00001.safetensors", "snapshot.safetensors"):
        one, other = (f / "checkpoints" / f"step-{STEPS:08d}" / file for f in (run, whole))
        assert one.read_bytes() == other.read_bytes()


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """A run that nobody stopped."""
    run = tmp_path_factory.mktemp("launchers") / "whole"
    assert deepspeed(files, run).wait(280) == 0
    return run


@pytest.mark.parametrize(
    "number,told,code",
    [
        (signal.SIGTERM, "a rank", STOPPED),
        (signal.SIGUSR1, "a rank", STOPPED),
        # The outer of DeepSpeed's two processes dies of it; the inner passes it on and waits.
        (signal.SIGTERM, "all processes", -signal.SIGTERM),
        (signal.SIGINT, "all processes", -signal.SIGINT),  # Ctrl-C
    ],
)
def test_deepspeed_lets_a_stopped_run_save(files, tmp_path, finding, full, request, number, told, code):
    if not full and (number, told) != (signal.SIGTERM, "all processes"):
        pytest.skip("make faults runs the others, and resumes")
    run = tmp_path / "run"
    launched = deepspeed(files, run)
    await_a_step(launched, run)
    family = psutil.Process(launched.pid).children(recursive=True)
    began = time.monotonic()
    if told == "a rank":
        ranks_of(launched)[1].send_signal(number)
    else:
        os.killpg(launched.pid, number)
    assert launched.wait(100) == code
    assert not psutil.wait_procs(family, timeout=GRACE_SECONDS)[1]
    seconds = time.monotonic() - began
    assert seconds < GRACE_SECONDS
    assert_stopped(run)
    if full:
        assert deepspeed(files, run, "--resume", "auto").wait(280) == 0
        assert_same(run, request.getfixturevalue("whole"))
        name = signal.Signals(number).name
        finding(
            "F7", f"deepspeed, {name} to {told}: exit {code}, all ended in {seconds:.0f} s, resumed bit-equal"
        )


@pytest.fixture
def over_ssh(files, tmp_path):
    """One rank on each host of the example; ssh and pdsh are scripts that start with a new environment."""
    write_programs(
        tmp_path / "bin",
        ssh=f'echo "$*" >> {tmp_path}/ssh; echo 127.0.0.1',
        pdsh=f"""
            echo "$*" > {tmp_path}/pdsh
            [ -z "${{PDSH_EXIT:-}}" ] || exit "$PDSH_EXIT"
            IFS=, read -ra hosts <<< "$5"
            shift 5
            node=0 status=0 started=()
            for host in "${{hosts[@]}}"; do
                line="$*"
                (cd / && exec env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${{line//%n/$node}}") &
                started+=($!) node=$((node + 1))
            done
            for one in "${{started[@]}}"; do
                wait "$one" || {{ code=$?; ((code > status)) && status=$code; }}
            done
            exit $status""",
    )
    launcher = ("deepspeed", "--hostfile", "launch/hostfile.example", "--num_gpus", "1", "--master_port")
    options = ("--config", files[0], "--ds_config", files[1])

    def submit(run: Path, **environment: str) -> subprocess.Popen:
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        program = (PROGRAM, *options, f"run.folder={run}")
        return start(*launcher, str(free_port()), *program, **{**environment, "PATH": path})

    return submit


def test_deepspeed_asks_the_hosts_of_a_hostfile_and_gives_their_code_back(over_ssh, tmp_path):
    assert over_ssh(tmp_path / "run", PDSH_EXIT=str(STOPPED)).wait(60) == STOPPED
    assert (tmp_path / "ssh").read_text().splitlines()[-1] == "node-0 hostname -I"
    said = (tmp_path / "pdsh").read_text()
    assert said.startswith("-S -f 1024 -w node-0,node-1 ") and f"cd {ROOT};" in said
    assert "--node_rank=%n --master_addr=127.0.0.1" in said and f"{PROGRAM} --config" in said


def test_ranks_on_the_hosts_of_a_hostfile_stop_together(over_ssh, full, tmp_path, finding):
    if not full:
        pytest.skip("make faults runs it")
    run = tmp_path / "run"
    launched = over_ssh(run)
    await_a_step(launched, run)
    ranks = ranks_of(launched)
    assert sorted(rank.environ()["RANK"] for rank in ranks) == ["0", "1"]
    began = time.monotonic()
    ranks[1].send_signal(signal.SIGTERM)
    assert launched.wait(100) == STOPPED
    seconds = time.monotonic() - began
    assert seconds < GRACE_SECONDS
    assert_stopped(run)
    files = {path.name for path in find_checkpoint(run, "auto").glob("rank-*")}
    assert files == {"rank-00000.safetensors", "rank-00001.safetensors"}
    finding("F7", f"deepspeed --hostfile, SIGTERM to one host's rank: exit {STOPPED} in {seconds:.0f} s")


def write_programs(folder: Path, **bodies: str) -> None:
    """Scripts by name, to go first on PATH."""
    folder.mkdir()
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)


@pytest.fixture
def slurm(files, tmp_path):
    """Run launch/slurm.sbatch for one node of two ranks, where Slurm's programs are scripts."""
    programs = {
        "sinfo": "true",
        "scontrol": f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> {tmp_path}/scontrol; fi',
        "srun": f"""
            echo "$*" > {tmp_path}/srun
            [ -z "${{SRUN_EXIT:-}}" ] || exit "$SRUN_EXIT"
            ranks=$2 status=0 started=()
            shift 3
            for ((rank = 0; rank < ranks; rank++)); do
                SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=$ranks "$@" &
                started+=($!)
            done
            for one in "${{started[@]}}"; do
                wait "$one" || status=$?
            done
            exit $status""",
    }
    write_programs(tmp_path / "bin", **programs)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node", "SLURM_NTASKS_PER_NODE": "2"}

    def submit(*options: str, **environment: str) -> subprocess.Popen:
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return start("bash", "launch/slurm.sbatch", *files, *options, **{**job, **environment, "PATH": path})

    return submit


@pytest.mark.parametrize("code,requeued", [(STOPPED, True), (HUNG, True), (1, False)])
def test_slurm_starts_the_ranks_on_one_node_too_and_requeues(slurm, tmp_path, full, code, requeued):
    if not full and code != STOPPED:
        pytest.skip("make faults runs the others")
    assert slurm(SRUN_EXIT=str(code)).wait(60) == code
    said = (tmp_path / "srun").read_text()
    assert said.startswith("-n 2 --export=ALL") and f"{PROGRAM} --ds_config" in said
    assert (tmp_path / "scontrol").is_file() is requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"


def test_slurm_goes_on_where_its_signal_stopped_the_run(slurm, whole_if_full, tmp_path, finding):
    run = tmp_path / "run"
    job = slurm(f"run.folder={run}")
    await_a_step(job, run)
    began = time.monotonic()
    for rank in ranks_of(job):  # what --signal=USR1@180 sends, and to whom
        rank.send_signal(signal.SIGUSR1)
    assert job.wait(100) == STOPPED and (tmp_path / "scontrol").is_file()
    seconds = time.monotonic() - began
    assert seconds < GRACE_SECONDS
    assert_stopped(run)
    assert slurm(f"run.folder={run}").wait(280) == 0
    assert_same(run, whole_if_full)
    finding(
        "F7",
        f"slurm.sbatch, SIGUSR1 to the tasks: exit {STOPPED} in {seconds:.0f} s, requeued, gone on bit-equal",
    )


@pytest.fixture
def whole_if_full(full, request) -> Path:
    if not full:
        pytest.skip("make faults runs it")
    return request.getfixturevalue("whole")
