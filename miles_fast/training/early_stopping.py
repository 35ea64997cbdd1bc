"""Early stopping: the best model of a run is kept, and a run that no longer gets better ends."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_fast.distributed import logger
from miles_fast.files import whole_folder, write_whole

BEST = "best"  # RUN/best: the model folder of the best evaluation, and best.json


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an evaluation means: the best so far (`improved`), and whether the run has had its last chance."""

    improved: bool = False
    stop: bool = False


class EarlyStopping:
    """Watches the R-sum of one evaluation set: R@1 + R@5 + R@10 of both directions, as fractions.

    What was best so far stands in RUN/best/best.json, so that a resumed run goes on with it. The first to be
    judged is the model that the run starts from (step 0): RUN/best is never worse than that. Every rank calls
    `judge` with the same result and comes to the same verdict.
    """

    def __init__(self, run: Path, name: str, patience: int, evaluate_every: int) -> None:
        """Ends the run `patience` evaluations after the best one of the set called `name`."""
        self._run, self._name = run, name
        self._steps = patience * evaluate_every
        self._best: tuple[int, float] | None = None
        self._before = self._best
        record = run / BEST / "best.json"
        if record.is_file():
            best = json.loads(record.read_text())
            self._best = best["step"], best["r_sum"]

    @property
    def started(self) -> bool:
        """Something was judged already, in this run or in the one that it resumes."""
        return self._best is not None

    def judge(self, step: int, evaluation: dict[str, Any]) -> Verdict:
        """The verdict on the evaluation after `step`."""
        value = r_sum(evaluation[self._name])
        if self._best is None or value > self._best[1]:
            self._before, self._best = self._best, (step, value)
            return Verdict(improved=True)
        return Verdict(stop=step - self._best[0] >= self._steps)

    def lost(self, step: int) -> None:
        """The best model, after `step`, could not be kept: another one has to beat what was best before it.

        But for the start (step 0), which is still where it came from: nothing worse is kept.
        """
        if step:
            self._best = self._before and (step, self._before[1])

    def keep(self, student: Path, step: int, evaluation: dict[str, Any]) -> None:
        """Copy the model folder of a checkpoint to RUN/best, whole or not at all; rank 0 alone calls it."""
        value = r_sum(evaluation[self._name])
        record = {"step": step, "set": self._name, "r_sum": value, "evaluation": evaluation}
        with whole_folder(self._run / BEST) as partial:
            shutil.copytree(student, partial, dirs_exist_ok=True)
            write_whole(partial / "best.json", json.dumps(record, indent=2) + "\n")
        logger.info(
            "step %d is the best so far (R-sum %.1f): kept in %s", step, 100 * value, self._run / BEST
        )


def r_sum(retrieval: dict[str, Any]) -> float:
    """R@1 + R@5 + R@10 of both directions of a retrieval result as a dict."""
    return sum(retrieval[way][k] for way in ("text_to_video", "video_to_text") for k in ("r1", "r5", "r10"))
