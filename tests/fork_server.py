"""Programs forked from a server that has imported what they all import, which takes longer than their work.

The server only imports. It starts no thread and opens no CUDA context, neither of which a fork would survive.
Where there is a GPU to be seen, it leaves the importing to the programs: children of a process that has asked
the driver find no GPU, and take the CPU.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
IMPORTED = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "miles_fast.training.loop",
    "miles_fast.evaluation.validation",
    "miles_fast.evaluation.benchmark",
    "miles_fast.export.run",
)
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # an environment where a GPU is not looked for
# What imports look at: programs that differ in one of them have different servers.
LOOKED_AT = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TRITON_INTERPRET")

# What a launcher tells a rank; an engine test in this process may have set them.
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOTHING: dict[str, str] = {}


class Program:
    """A Python script that runs in a session of its own; what it prints goes to files."""

    def __init__(self, *command: str, env: dict[str, str] = NOTHING, cwd: Path = ROOT) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        env = kept | {"PYTHONPATH": PATHS} | env
        self._printed = [tempfile.TemporaryFile() for _ in range(2)]
        self._told, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"command": command, "env": env, "cwd": str(cwd)}).encode()
        with other:
            server, _ = _server(*(env.get(name) for name in LOOKED_AT))
            files = [*(file.fileno() for file in self._printed), other.fileno()]
            socket.send_fds(server, [request], files)
        self.returncode: int | None = None
        self.pid = int(self._told.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; negative: the signal that ended it. Raises TimeoutError."""
        if self.returncode is None:
            self._told.settimeout(timeout)
            self.returncode = int(self._told.recv(32))
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(BlockingIOError):
            self.wait(0)
        return self.returncode

    def kill(self) -> None:
        """Kill it and what it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def printed(self) -> tuple[str, str]:
        """What went to stdout and to stderr so far."""
        # Not by seek and read: the program writes at the same position.
        files = [(file.fileno(), os.fstat(file.fileno()).st_size) for file in self._printed]
        return tuple(os.pread(file, size, 0).decode() for file, size in files)


def run(*command: str, cwd: Path = ROOT, timeout: float = 200) -> subprocess.CompletedProcess:
    """Run a script to its end, as subprocess.run does with its output captured."""
    program = Program(*command, cwd=cwd)
    try:
        return subprocess.CompletedProcess(command, program.wait(timeout), *program.printed())
    finally:
        program.kill()


class Ranks:
    """Ranks of one run, each a program."""

    def __init__(self, ranks: int, *command: str, env: dict[str, str] = NOTHING) -> None:
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        numbers = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks))
        self.programs = [Program(*command, env=env | group | number) for number in numbers]

    def wait(self, timeout: float = 240, besides: tuple[int, ...] = ()) -> list[int | None]:
        """Exit codes; ranks `besides` are not waited for, and killed then. `errors` has what they said.

        Raises TimeoutError with all of it.
        """
        limit = time.monotonic() + timeout
        try:
            for rank, program in enumerate(self.programs):
                if rank not in besides:
                    program.wait(max(limit - time.monotonic(), 0.1))
            return [program.poll() for program in self.programs]
        except TimeoutError as late:
            said = (f"rank {rank}: {program.printed()[1]}" for rank, program in enumerate(self.programs))
            raise TimeoutError("\n".join(said)) from late
        finally:
            for program in self.programs:
                program.kill()
            self.errors = [program.printed()[1] for program in self.programs]

    def finish(self, timeout: float) -> None:
        """Wait until all have ended with 0. Raises AssertionError with the last lines of those that have not.

        Once one has failed the others, which may wait for it for ever, get a few seconds.
        """
        limit = time.monotonic() + timeout
        try:
            codes = [program.poll() for program in self.programs]
            while None in codes and (now := time.monotonic()) < limit:
                if any(codes):
                    limit = min(limit, now + 5)
                time.sleep(0.05)
                codes = [program.poll() for program in self.programs]
        finally:
            for program in self.programs:
                program.kill()
        said = []
        for rank, (code, program) in enumerate(zip(codes, self.programs, strict=True)):
            if code != 0:
                how = "did not end" if code is None else f"ended with {code}"
                said.append(f"rank {rank} {how}:\n{_end(program.printed()[1])}")
        if said:
            raise AssertionError("\n".join(said))


def _end(text: str, lines: int = 20, width: int = 200) -> str:
    return "\n".join(line[-width:] for line in text.strip().splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@functools.cache
def _server(*looked_at: str | None) -> tuple[socket.socket, subprocess.Popen]:
    """A server for programs with these values of LOOKED_AT; it ends when this process does."""
    given = dict(zip(LOOKED_AT, looked_at, strict=True))
    environment = {**os.environ, **given, "PYTHONPATH": PATHS}
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            start_new_session=True,
        )
    return ours, process


def serve(control: socket.socket) -> dict:
    """Fork a child for each request and tell how it ended; returns in the children only, with the request."""
    running = selectors.DefaultSelector()
    running.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in running.select():
            if key.fileobj is not control:
                pid, told = key.data
                running.unregister(key.fileobj)
                os.close(key.fd)
                with told, contextlib.suppress(BrokenPipeError):
                    told.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                continue
            request, files, *_ = socket.recv_fds(control, 1 << 20, 3)
            if not request:  # the tests have ended
                for key in running.get_map().values():
                    if key.data:
                        os.killpg(key.data[0], signal.SIGKILL)
                sys.exit()
            told = socket.socket(fileno=files.pop())
            pid = os.fork()
            if pid == 0:
                os.setsid()
                told.send(str(os.getpid()).encode())
                for number, file in enumerate(files, 1):
                    os.dup2(file, number)
            for file in files:
                os.close(file)
            if pid == 0:
                for key in running.get_map().values():
                    if key.data:
                        os.close(key.fd)
                return json.loads(request)
            running.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, told))


def main() -> None:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not any(Path("/dev").glob("nvidia[0-9]*")):
        from miles_fast.models.torchvision_cpu import repair_torchvision

        repair_torchvision()
        from transformers import DistilBertModel  # noqa: F401

        for name in IMPORTED:
            importlib.import_module(name)
        with contextlib.suppress(ImportError):
            importlib.import_module("nvidia.dali.fn")
    gc.freeze()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
