"""The step log: on a disk that is full, and with lines that are no records."""

import contextlib
import errno
import logging
import os

import pytest

from miles_fast.training.progress import StepLog, read_log


class Disk:
    """A file that takes so many bytes and then none, until it is emptied."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self):
        self.file.close()


@pytest.fixture
def log(tmp_path):
    log = StepLog(tmp_path, 0, 9)
    yield log
    log.close()


def test_records_wait_for_a_full_disk_and_all_arrive(log, tmp_path, caplog):
    disk = log._file = Disk(log._file, room=60)
    with caplog.at_level(logging.ERROR):
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    assert caplog.text.count("No space left on device") == 1 and str(tmp_path / "log.jsonl") in caplog.text
    assert (tmp_path / "log.jsonl").stat().st_size == 60
    disk.room = 10_000
    log.write(4, {"loss": 4.0})
    assert [record["loss"] for record in read_log(tmp_path)] == [1.0, 2.0, 3.0, 4.0]


def test_a_disk_that_stays_full_is_named_at_the_end(log, tmp_path, caplog):
    log._file = Disk(log._file, room=0)
    log.write(1, {"loss": 1.0})
    with caplog.at_level(logging.ERROR):
        log.close()
    assert "records are missing" in caplog.text


def test_tensorboard_keeps_the_step_that_a_resumed_run_goes_on_behind(tmp_path):
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with contextlib.closing(StepLog(tmp_path, first, 9)) as log:
            for step in steps:
                log.write(step, {"loss": 10.0 * first + step})
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


def test_tensorboard_is_left_out_when_it_cannot_write(log, tmp_path, caplog):
    class Board:
        def add_scalar(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log._board = Board()
    with caplog.at_level(logging.ERROR):
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 2.0})
    assert caplog.text.count("only log.jsonl goes on") == 1
    assert len(read_log(tmp_path)) == 2


def test_a_last_line_that_a_full_disk_cut_is_no_record(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"step"')
    assert read_log(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("line", [b"\xff", b"{", b"[1]", b"{}"], ids=["bytes", "json", "list", "no step"])
@pytest.mark.parametrize("read", [read_log, lambda run: StepLog(run, 2, 9)], ids=["read", "resumed"])
def test_a_line_that_is_no_record_is_named(tmp_path, read, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2 is not a record .*delete that line"):
        read(tmp_path)
