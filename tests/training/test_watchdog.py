"""Who is to blame for a standstill, from the reports alone."""

from miles_fast.training.watchdog import _culprit


def report(beat, progress, doing="computing step 9", state="whole"):
    return f"{beat}|{progress}|{doing}|{state}|loop.py:1 in f"


def verdict(*rounds, limit=10.0, interval=1.0):
    """What is found after rounds of (seconds, reports)."""
    seen = {}
    found = None
    for now, reports in rounds:
        found = _culprit(reports, seen, float(now), limit, interval)
        if found:
            break
    return found


def test_the_least_far_of_a_standstill_hangs():
    def reports(beat):
        return [report(beat, 20), report(beat, 19, "waiting for the data of step 9"), report(beat, 20)]

    assert verdict((0, reports(1)), (9, reports(2))) is None
    found = verdict((0, reports(1)), (9, reports(2)), (11, reports(3)))
    assert found == (
        "no progress for 10 s (run.hang_seconds): rank 1 hangs while waiting for the data of step 9, at "
        "loop.py:1 in f"
    )


def test_any_progress_is_progress():
    rounds = [(10 * n, [report(n, 20), report(n, 20 + n)]) for n in range(9)]
    assert verdict(*rounds) is None


def test_the_first_step_may_take_longer():
    start = [report(1, 2), report(1, 2)]
    assert verdict((0, start), (49, [report(2, 2), report(2, 2)])) is None
    assert "rank 0 hangs" in verdict((0, start), (51, [report(2, 2), report(2, 2)]))


def test_a_silent_rank_is_gone_sooner_once_communication_broke():
    rounds = [(n, [report(n, 20), report(min(n, 2), 20)]) for n in range(1, 9)]
    assert verdict(*rounds) is None
    rounds = [(n, [report(n, 20, state="broken"), report(min(n, 2), 20)]) for n in range(1, 9)]
    assert verdict(*rounds).startswith("rank 1 gives no sign of life")
    assert verdict() is None and verdict((0, [])) is None
