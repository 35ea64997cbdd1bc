"""Reading processes: clips are read, checked, tokenised and, where they are videos, decoded beside training.

Requests and answers go through a socket pair; frames come back in memory that both processes map (a memfd,
which no container's limit on /dev/shm touches), so that nothing of their bytes is copied through Python. The
processes import neither torch nor the program that was started.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from socket import socketpair
from typing import Any

from miles_fast.data.clips import BadSample, Clip, ClipDraw, read_for_evaluation, read_or_substitute
from miles_fast.data.order import Draw
from miles_fast.data.shards import ShardSet
from miles_fast.models.caption_tokens import CaptionEncoder

SLOTS = 8  # answers of one process that are in use or on their way
SLOT_BYTES = 1 << 30  # address space; memory is taken as it is written
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """Some clips of one source: training draws with their seed, or (seed None) samples for evaluation."""

    source: int
    draw: ClipDraw
    items: tuple[Draw, ...] | tuple[int, ...]
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function of plain Python or numpy that would otherwise keep the training process from its work."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


Answer = list[tuple[Clip, list[BadSample]]] | list[Clip | BadSample]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What answers requests, in any process; without shard sets it only calls functions."""

    shard_sets: Sequence[ShardSet] = ()
    encode: CaptionEncoder | None = None

    def answer(self, request: Request | Call) -> Answer | list[Any]:
        """Read what a request names, or call a function, in this process. Raises ShardError."""
        if isinstance(request, Call):
            return [request.function(*request.arguments)]
        shards, draw = self.shard_sets[request.source], request.draw
        try:
            if request.seed is None:
                found = [read_for_evaluation(shards, sample, draw) for sample in request.items]
                tokens = iter(self.encode([clip.caption for clip in found if isinstance(clip, Clip)]))
                return [
                    replace(clip, tokens=next(tokens)) if isinstance(clip, Clip) else clip for clip in found
                ]
            drawn = [read_or_substitute(shards, item, draw, request.seed) for item in request.items]
            tokens = self.encode([clip.caption for clip, _ in drawn])
            return [(replace(clip, tokens=own), bad) for (clip, bad), own in zip(drawn, tokens, strict=True)]
        finally:
            shards.release()


class ReadingPool:
    """Processes that each hold a copy of a reader; used by one thread."""

    def __init__(self, reader: Reader, num_workers: int, slot_bytes: int = SLOT_BYTES) -> None:
        """`slot_bytes` of shared memory hold one answer; a larger one comes through the socket."""
        self._workers = [_Worker(reader, slot_bytes) for _ in range(num_workers)]
        self._turns = itertools.cycle(self._workers)

    def submit(self, request: Request) -> Pending:
        """Share a request out in contiguous parts; at most SLOTS - 1 parts or calls may be pending."""
        share = -(-len(request.items) // len(self._workers))
        workers = []
        for start in range(0, len(request.items), share or 1):
            worker = next(self._turns)
            items = request.items[start : start + share]
            worker.send(Request(source=request.source, draw=request.draw, items=items, seed=request.seed))
            workers.append(worker)
        return Pending(workers)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Pending:
        """Call a function that can be pickled; its result is the only answer."""
        worker = next(self._turns)
        worker.send(Call(function=function, arguments=arguments))
        return Pending([worker])

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()


class Pending:
    """A request on its way; pending ones are collected in the order of their submission."""

    def __init__(self, workers: list[_Worker]) -> None:
        self._workers = workers

    def collect(self) -> Answer:
        """The answers in order; their frames are good until `release`. Raises what the reading raised."""
        return [item for worker in self._workers for item in worker.receive()]

    def release(self) -> None:
        """Give the frames' memory back."""
        for worker in self._workers:
            worker.in_use -= 1


class _Worker:
    def __init__(self, reader: Reader, slot_bytes: int) -> None:
        ours, theirs = socketpair()
        memory = os.memfd_create("miles_fast clips")
        os.ftruncate(memory, SLOTS * slot_bytes)
        self._memory = memoryview(mmap.mmap(memory, SLOTS * slot_bytes))
        arguments = f"{theirs.fileno()}, {memory}, {slot_bytes}"
        program = f"from miles_fast.data.reading import serve; serve({arguments})"
        # Launchers send signals to these processes too, but the training process decides when to end, and may
        # need data until then. A process inherits what is blocked: there is no moment without it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=(theirs.fileno(), memory),
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
                    "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
                },
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        os.close(memory)
        self._connection = Connection(ours.detach())
        self._connection.send(reader)
        self.in_use = 0

    def send(self, request: Request | Call) -> None:
        assert self.in_use < SLOTS
        self.in_use += 1
        try:
            self._connection.send(request)
        except ConnectionError as error:
            raise self._ended() from error

    def receive(self) -> Answer:
        try:
            body, places = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._ended() from error
        found = pickle.loads(body, buffers=[self._memory[start:stop] for start, stop in places])
        if isinstance(found, Exception):
            raise found
        return found

    def _ended(self) -> RuntimeError:
        return RuntimeError(
            f"a reading process ended with status {self._process.wait()} (killed for memory, or a decoder "
            "crashed); lower data.decode_workers, or prepare the videos with launch/prepare.py"
        )

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(connection_number: int, memory_number: int, slot_bytes: int) -> None:
    """Answer requests until the other end closes: what a reading process runs."""
    connection = Connection(connection_number)
    slots = memoryview(mmap.mmap(memory_number, SLOTS * slot_bytes))
    try:
        reader = connection.recv()
        for start in itertools.cycle(range(0, SLOTS * slot_bytes, slot_bytes)):
            request = connection.recv()
            try:
                found: Answer | Exception = reader.answer(request)
            except (ValueError, OSError, MemoryError) as error:
                found = error
            body, places = _store(found, slots[start : start + slot_bytes])
            connection.send((body, [(start + first, start + last) for first, last in places]))
    except (EOFError, ConnectionError):
        return


def _store(found: Answer | Exception, slot: memoryview) -> tuple[bytes, list[tuple[int, int]]]:
    """The pickled answer, and where in the slot its arrays were put."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(found, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    if sum(len(view) + _ALIGNMENT for view in views) > len(slot):
        return pickle.dumps(found, protocol=5), []
    places, start = [], 0
    for view in views:
        slot[start : start + len(view)] = view
        places.append((start, start + len(view)))
        start += -(-len(view) // _ALIGNMENT) * _ALIGNMENT
    return body, places
