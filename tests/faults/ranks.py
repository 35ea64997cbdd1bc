"""One rank of a tiny run whose faults are given: tests start it with RANK, WORLD_SIZE and so on set.

Without dropout, and with the joined batch's masks dealt out, any number of ranks computes the same.
"""

import argparse
import faulthandler
import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from tiny import ds_tree, joined_masks, tiny_config  # noqa: E402

from miles_fast.data.loader import Loader  # noqa: E402
from miles_fast.distributed import configure_logging, gather_objects, rank, world_size  # noqa: E402
from miles_fast.evaluation.validation import validation  # noqa: E402
from miles_fast.training import loop, saving  # noqa: E402
from miles_fast.training.ds_config import check_ds_config  # noqa: E402
from miles_fast.training.numerics import LossGuard  # noqa: E402
from miles_fast.training.saving import Saver  # noqa: E402
from miles_fast.training.signals import STOPPED, Stopped  # noqa: E402


def inject(fault: str, steps: int, note: Path):
    """A `deal` for `pretrain` that notes the keys and brings in `kind:step:rank` (kind:step-step:rank).

    `die:0:rank` is before the first batch, `die:start:rank` and `hang:start:rank` before there is an engine.
    """
    kind, when, who = fault.split(":") if fault else ("", "0", "0")
    if when == "start":
        build, when = loop.build_engine, "0"

        def never(*rest):
            if rank() == int(who):
                os.kill(os.getpid(), signal.SIGKILL) if kind == "die" else time.sleep(10**6)
            return build(*rest)

        loop.build_engine = never
    first, last = (int(part) for part in (when.split("-") * 2)[:2])
    if kind == "int":  # which a shell has its background ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def deal(loader, first_step):
        accumulation = loader.share.accumulation
        if (kind, first, int(who)) == ("die", 0, rank()):
            os.kill(os.getpid(), signal.SIGKILL)
        for number, batch in enumerate(Loader.batches(loader, first_step)):
            step = first_step + number // accumulation + 1
            if rank() == int(who) and first <= step <= last:
                if kind == "nan-data":
                    batch = replace(batch, video_BTCHW=batch.video_BTCHW * float("nan"))
                elif kind == "hang":
                    time.sleep(10**6)
                elif kind == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif kind == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif kind in ("term", "usr1", "int"):
                    note.with_suffix(".signalled").write_text(str(time.monotonic()))
                    os.kill(os.getpid(), signal.Signals[f"SIG{kind.upper()}"])
            with open(note, "a") as file:
                file.write(json.dumps({"data": step, "keys": batch.keys}) + "\n")
            yield batch

    if kind in ("nan-gradient", "spike"):
        check, calls = LossGuard.check, [0]

        def broken(self, losses, keys):
            calls[0] += 1
            now = rank() == int(who) and first <= calls[0] <= last
            if now and kind == "spike":
                losses = losses._replace(total=losses.total * 100)
            loss = check(self, losses, keys)
            return loss * float("inf") if now and kind == "nan-gradient" else loss

        LossGuard.check = broken
    return deal


def failing_evaluation(ranks: set[int]):
    """Raises an error on these ranks before it communicates; the others wait in a collective."""

    def evaluate(model, device):
        if rank() in ranks:
            raise ValueError("the evaluation fails")
        gather_objects(None)
        return {}

    saving._ALONE_SECONDS = 3.0
    return evaluate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--joined", type=int, default=4, help="clips of a micro step over all ranks")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--resume")
    parser.add_argument("--fault", default="")
    parser.add_argument("--wait-for-saves", action="store_true", help="so that none is left out")
    parser.add_argument("--evaluate", action="store_true", help="on the evaluation set, as programs do")
    parser.add_argument("--evaluation-fails-on", type=int, nargs="*", metavar="RANK")
    parser.add_argument("--run-keys", type=json.loads, default={})
    parser.add_argument("--ds-keys", type=json.loads, default={})
    options = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(180)  # most tests wait 200 s: for whoever asks where a rank was
    configure_logging()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    run = {"folder": str(options.run), "steps": options.steps, "hang_seconds": 120} | options.run_keys
    config = tiny_config(options.root, run=run, method={"snapshot": {"momentum": 0.9}})
    config = replace(config, model=replace(config.model, text=replace(config.model.text, dropout=0.0)))
    tree = ds_tree(options.stage, options.joined // ranks, options.accumulation) | options.ds_keys
    settings = check_ds_config(tree, "ds", config, cuda=torch.cuda.is_available(), ranks=ranks)
    # A reading process draws them, and knows `tiny` but not this program.
    loop.partial = lambda _, *rest: partial(joined_masks, *rest, world_size())
    if options.wait_for_saves:
        begin = Saver.start
        Saver.start = lambda saver, *rest: (begin(saver, *rest), saver.settle())
    evaluate = validation(config, settings.batch) if options.evaluate else None
    if options.evaluation_fails_on:
        evaluate = failing_evaluation(set(options.evaluation_fails_on))
    options.run.mkdir(parents=True, exist_ok=True)
    note = options.run.with_name(f"{options.run.name}.keys{os.environ.get('RANK', 0)}.jsonl")
    loop.pretrain(
        config,
        settings,
        resume=options.resume,
        evaluate=evaluate,
        deal=inject(options.fault, options.steps, note),
    )


if __name__ == "__main__":
    try:
        main()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
