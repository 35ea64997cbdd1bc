"""Reading processes: answers equal to reading here, errors handed over, death noticed."""

import os
import signal

import numpy as np
import pytest
from tiny import caption, write_frames

from miles_fast.data import reading
from miles_fast.data.clips import ClipDraw
from miles_fast.data.order import draw_at
from miles_fast.data.reading import Reader, ReadingPool, Request
from miles_fast.data.shards import ShardError, ShardSet
from miles_fast.data.vocabulary import build_vocabulary
from miles_fast.models.caption_tokens import CaptionEncoder
from miles_fast.models.text_encoder import load_tokenizer

DRAW = ClipDraw(num_frames=2, takes="jpeg")


@pytest.fixture
def reader(tmp_path):
    build_vocabulary(map(caption, range(30)), tmp_path / "tokenizer")
    tars = write_frames(tmp_path / "one", 9), write_frames(tmp_path / "two", 4)
    return Reader(
        shard_sets=[*map(ShardSet, tars)],
        encode=CaptionEncoder(load_tokenizer(tmp_path / "tokenizer"), 8),
    )


@pytest.fixture
def pool(reader):
    pool = ReadingPool(reader, 2)
    yield pool
    pool.close()


def requests(reader):
    for start in (0, 7):
        for source, shards in enumerate(reader.shard_sets):
            draws = tuple(draw_at(len(shards), 3, place) for place in range(start, start + 5))
            yield Request(source=source, draw=DRAW, items=draws, seed=3)
    yield Request(source=0, draw=DRAW, items=(8, 0, 4), seed=None)


def same(one, two):
    if isinstance(one, tuple):
        return one[1] == two[1] and same(one[0], two[0])
    frames = zip(one.frames, two.frames, strict=True)
    fields = (one.view, one.caption, one.key) == (two.view, two.caption, two.key)
    frames = [*frames, (one.tokens, two.tokens)]
    return fields and all(np.array_equal(a, b) for a, b in frames)


@pytest.mark.parametrize("slot_bytes", [1 << 24, 100])
def test_answers_equal_reading_here(reader, slot_bytes):
    # 100 bytes hold no clip: the answers then come through the socket.
    pool = ReadingPool(reader, 2, slot_bytes)
    for request in requests(reader):
        pending = pool.submit(request)
        found = pending.collect()
        expected = reader.answer(request)
        assert len(found) == len(expected) and all(map(same, found, expected))
        pending.release()
    pool.close()


def test_pending_answers_do_not_overwrite_each_other(reader, pool):
    asked = list(requests(reader))[: reading.SLOTS]
    pending = [pool.submit(request) for request in asked]
    found = [one.collect() for one in pending]
    for request, answers in zip(asked, found, strict=True):
        assert all(map(same, answers, reader.answer(request)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_the_whole_program_do_not_end_reading(reader, number):
    pool = ReadingPool(reader, 1)
    os.kill(pool._workers[0]._process.pid, number)  # at once: it has not even begun
    request = next(requests(reader))
    pending = pool.submit(request)
    assert all(map(same, pending.collect(), reader.answer(request)))
    os.kill(pool._workers[0]._process.pid, number)
    pending.release()
    assert all(map(same, pool.submit(request).collect(), reader.answer(request)))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    pool.close()


def test_what_reading_raises_is_raised_here(reader, pool):
    for path in reader.shard_sets[1].paths:
        path.unlink()
    request = Request(source=1, draw=DRAW, items=(0,), seed=None)
    with pytest.raises(ShardError, match="cannot be opened.*restore it"):
        pool.submit(request).collect()


def test_a_dead_process_is_named(reader, pool):
    for worker in pool._workers:
        os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with status -9"):
        pool.submit(next(requests(reader))).collect()


def test_functions_are_called_there_in_turn_with_reading(reader, pool):
    request = next(requests(reader))
    pending = [(pool.submit(request), pool.call(np.full, 3, number)) for number in range(3)]
    for number, (clips, called) in enumerate(pending):
        assert all(map(same, clips.collect(), reader.answer(request)))
        assert called.collect()[0].tolist() == [number] * 3
        clips.release()
        called.release()
    with pytest.raises(ValueError, match="negative dimensions"):
        pool.call(np.full, -1, 0).collect()
