"""What the watchdog keeps of a start; what it ends is in tests/faults/test_ends.py."""

from miles_fast.training import watchdog as module
from miles_fast.training.watchdog import Watchdog


def test_phases_of_a_start_add_up_where_one_is_reported_twice(monkeypatch):
    clock = iter((0.0, 2.0, 5.0, 6.0, 10.0, 11.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    watchdog = Watchdog(0)
    for doing in ("building", "computing", "waiting", "computing"):
        watchdog.report(doing)
    watchdog.started()
    watchdog.report("computing the second step")
    watchdog.started()
    phases = watchdog.start_phases
    assert phases == {"starting": 2.0, "building": 3.0, "computing": 2.0, "waiting": 4.0}
