"""Who is to blame for a standstill, from the reports alone."""

from miles_fast.training.watchdog import _culprit


def report(beat, progress, doing="computing step 9", state="going"):
    return f"{beat}|{progress}|{state}|loop.py:1 in f|{doing}"


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


def test_the_start_and_the_first_step_may_take_longer():
    def start(beat):
        return [
            report(beat, 4, state="starting"),
            report(beat, 3, "restoring a|b", state="starting"),
            report(beat, 4, state="starting"),
        ]

    assert verdict((0, start(1)), (49, start(2))) is None
    found = verdict((0, start(1)), (51, start(2)))
    assert found.endswith("rank 1 hangs while restoring a|b, at loop.py:1 in f")
    assert (
        verdict((0, start(1)), (51, [report(2, 5), *start(2)[1:]]), (101, [report(3, 5), *start(3)[1:]]))
        is None
    )


def test_a_silent_rank_is_gone_sooner_once_communication_broke():
    rounds = [(n, [report(n, 20), report(min(n, 2), 20)]) for n in range(1, 9)]
    assert verdict(*rounds) is None
    rounds = [(n, [report(n, 20, state="broken"), report(min(n, 2), 20)]) for n in range(1, 9)]
    assert verdict(*rounds).startswith("rank 1 gives no sign of life")
    assert verdict() is None and verdict((0, [])) is None
