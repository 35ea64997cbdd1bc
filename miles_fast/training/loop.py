"""The training loop: batch, losses, an optimizer step, the snapshot's step, log, checkpoints.

What can go wrong is dealt with elsewhere: `numerics` has bad steps skipped, `recovery` saves and goes back,
`signals` stops the loop, `watchdog` ends it when a rank hangs.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_fast.config import Config
from miles_fast.data.batches import Batch, Quarantine
from miles_fast.data.loader import Loader
from miles_fast.data.order import Share
from miles_fast.distributed import barrier, logger, note_once, rank, world_size
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training.checkpoint import find_checkpoint, read_state, restore_checkpoint
from miles_fast.training.ds_config import EngineSettings
from miles_fast.training.early_stopping import EarlyStopping, Verdict
from miles_fast.training.engine import build_engine, gradient_norm, init_process_group, release_engine
from miles_fast.training.graphs import capture_passes, sample_inputs
from miles_fast.training.masks import draw_step_masks
from miles_fast.training.memory_report import OutOfMemory, memory_error, memory_report, warn_of_full_memory
from miles_fast.training.meter import Meter
from miles_fast.training.numerics import LossGuard, SkippedData, UpdateCheck, warn_of_collapse
from miles_fast.training.objective import Losses
from miles_fast.training.progress import StepLog, process_seconds
from miles_fast.training.recovery import (
    Deal,
    Evaluate,
    Training,
    keep_best,
    roll_back,
    save_if_due,
    saving_on_error,
    skipped,
)
from miles_fast.training.saving import Saver
from miles_fast.training.signals import Ballot, StopRequest, Vote
from miles_fast.training.snapshot import Snapshot
from miles_fast.training.start import build_models, make_folder, prepare_folder
from miles_fast.training.watchdog import Watchdog
from miles_fast.training.whole_student import WholeStudent


def pretrain(
    config: Config,
    settings: EngineSettings,
    *,
    resume: str | None = None,
    trust_checkpoint: bool = False,
    evaluate: Evaluate | None = None,
    deal: Deal = Loader.batches,
) -> None:
    """Train to `config.run.steps` optimizer steps.

    `resume` is `auto`, a run's folder or a checkpoint; an earlier run in the same folder that is not the
    one gone on with is moved aside. `trust_checkpoint` lets DeepSpeed's pickles be loaded. Raises Stopped,
    after a checkpoint, where a signal asked for it. `evaluate(model, device)` is called on all ranks every
    `run.evaluate_every` steps and at the end. `deal(loader, first_step)` gives the batches; benchmarks put
    others in the loader's place.
    """
    device = init_process_group()
    watchdog = Watchdog(config.run.hang_seconds)
    objective = engine = snapshot = None
    with contextlib.ExitStack() as stack:
        stack.callback(watchdog.close)
        watchdog.start()
        try:
            run = Path(config.run.folder)
            lock = stack.enter_context(contextlib.closing(make_folder(run)))
            checkpoint = find_checkpoint(run, resume) if resume else None
            state = read_state(checkpoint, config) if checkpoint else {"step": 0}
            first_step = state["step"]
            goes_on = checkpoint is not None and checkpoint.resolve().is_relative_to(run.resolve())
            torch.manual_seed(config.run.seed)
            watchdog.report("building the model")
            tokenizer = load_tokenizer(config.model.text.tokenizer_source)
            objective, snapshot = build_models(
                config, settings, len(tokenizer), device, initialize=checkpoint is None
            )
            student = WholeStudent(objective.model, settings.stage if evaluate else 0)
            watchdog.report("building the engine")
            engine = build_engine(objective, settings)
            stack.callback(release_engine, engine)
            torch.manual_seed(config.run.seed + 1 + rank())
            guard = LossGuard(config.run.spike_factor, device)
            if checkpoint:
                watchdog.report(f"restoring {checkpoint}")
                restore_checkpoint(checkpoint, state, engine, snapshot, guard, trust=trust_checkpoint)
                logger.info("resumed from %s at step %d of %d", checkpoint, first_step, config.run.steps)
            watchdog.report("opening the data")
            loader = _open_loader(config, settings, tokenizer, run, device)
            if config.run.cuda_graphs:
                if device.type == "cuda":
                    watchdog.report("capturing CUDA graphs")
                    capture_passes(objective, snapshot, sample_inputs(config, settings.batch, device))
                else:
                    note_once("run.cuda_graphs: without a GPU the passes run one operator at a time")
            clips = loader.share.global_batch
            if state.get("clips_per_step", clips) != clips:
                logger.warning(
                    "%s took %d clips a step, this run takes %d: the order of the data goes on at step %d of "
                    "the new size. Change gradient_accumulation_steps with the number of ranks to keep it",
                    *(checkpoint, state["clips_per_step"], clips, first_step),
                )
            # Not before: a start that fails leaves the folder as it was.
            prepare_folder(run, config, lock, keep=goes_on)
            log = stack.enter_context(contextlib.closing(StepLog(run, first_step, config.run.steps)))
            stop = stack.enter_context(contextlib.closing(StopRequest()))
            stopping = None
            if config.run.patience and evaluate is not None:
                watched = config.data.evaluation[0].name
                stopping = EarlyStopping(run, watched, config.run.patience, config.run.evaluate_every)
            training = Training(
                config=config,
                settings=settings,
                engine=engine,
                student=student,
                snapshot=snapshot,
                loader=loader,
                deal=deal,
                evaluate=evaluate,
                run=run,
                device=device,
                log=log,
                saver=Saver(run, config, engine, snapshot, device, checkpoint, guard),
                stop=stop,
                watchdog=watchdog,
                guard=guard,
                left_out=SkippedData(config.run, state.get("skipped_data", [])),
                trust_checkpoint=trust_checkpoint,
                stopping=stopping,
            )
            stop.listen()
            _train(training, first_step)
        except Exception as error:
            if (cause := memory_error(error)) is not None:
                report = memory_report(cause, objective, engine, snapshot, settings, device)
                raise OutOfMemory(report) from error
            lost = isinstance(error, RuntimeError) and "gloo" in str(error)
            if lost or isinstance(error, torch.distributed.DistError):
                watchdog.await_verdict()
            raise


def _open_loader(
    config: Config, settings: EngineSettings, tokenizer: Any, run: Path, device: torch.device
) -> Loader:
    listed = run / ("quarantine.jsonl" if rank() == 0 else f"quarantine.rank{rank()}.jsonl")
    masked = config.method.view != "none"
    return Loader(
        config.data,
        image_size=config.model.video.image_size,
        tokenizer=tokenizer,
        share=Share(
            batch=settings.batch, accumulation=settings.accumulation, rank=rank(), ranks=world_size()
        ),
        seed=config.run.seed,
        device=device,
        quarantine=Quarantine(listed, config.data.max_bad_share),
        draw_masks=partial(draw_step_masks, config, settings.batch, rank()) if masked else None,
    )


def _train(t: Training, step: int) -> None:
    """Train from behind `step`, as often from an earlier one as numbers go wrong."""
    if t.stopping is not None and step == 0 and not t.stopping.started:
        _keep_start(t)
    while (back := _train_from(t, step)) is not None:
        step = back
    barrier()


def _keep_start(t: Training) -> None:
    """Evaluate and keep the model that the run starts from."""
    t.watchdog.report("evaluating the model that the run starts from")
    verdict, result = _evaluate(t, 0)
    assert verdict.improved
    t.saver.start(0, t.left_out.ranges)
    keep_best(t, 0, result)


def _evaluate(t: Training, step: int) -> tuple[Verdict, dict[str, Any]]:
    """Evaluate the model after `step`, log it, and judge it where the run stops early."""
    assert t.evaluate is not None
    # Its last batch is smaller: not worth compiling for.
    with torch.compiler.set_stance("force_eager"):
        result = t.evaluate(t.student.gather(), t.device)
    t.log.write(step, {"evaluation": result})
    if t.stopping is None:
        return Verdict(), result
    return t.stopping.judge(step, result), result


def _train_from(t: Training, first_step: int) -> int | None:
    """Train to the end (None), or to where it has to go back to an earlier checkpoint: its step."""
    config, engine, snapshot, run = t.config, t.engine, t.snapshot, t.config.run
    meter = Meter(config, t.loader.share, t.device)
    ballot, update, position = Ballot(t.device), UpdateCheck(engine), t.left_out.position(first_step)
    engine.train()
    with contextlib.closing(t.deal(t.loader, position)) as batches:
        for step in range(first_step + 1, run.steps + 1):
            last, verdict = step == run.steps, Verdict()
            logs = step % run.log_every == 0 or step == first_step + 1 or last
            wanted = t.left_out.position(step - 1)
            ballot.cast(Vote(t.stop.signal is not None, t.saver.problem is not None, t.saver.busy))
            t.guard.begin()
            update.before()
            t.watchdog.report(f"waiting for the data of step {step}")
            for _ in range((wanted - position) * t.settings.accumulation):
                next(batches)
            position = wanted + 1
            for _ in range(t.settings.accumulation):
                waiting = time.perf_counter()
                batch = next(batches)
                meter.waited(time.perf_counter() - waiting)
                t.watchdog.report(f"computing step {step}")
                losses, norm = train_step(
                    engine, snapshot, batch, with_norm=logs, guard=t.guard, saver=t.saver
                )
                del batch  # here, and not while the next one is waited for: freeing it takes milliseconds
            vote = ballot.count()
            t.watchdog.started()
            t.log.advance()
            meter.stepped()
            applied = engine.was_step_applied()
            if snapshot is not None:
                snapshot.follow(engine.module.model, step, moved=applied)
            if applied:
                t.left_out.applied()
                update.after(step)
            elif skipped(t, step, wanted):
                return roll_back(t, step)
            if logs:
                update.verify()
                record = meter.record(losses, norm, engine, t.loader.quarantine)
                record["skipped_steps"] = t.left_out.total
                if t.log.is_empty:
                    record |= {"start_seconds": process_seconds(), "start_phases": t.watchdog.start_phases}
                else:
                    warn_of_full_memory(record.get("allocation_retries", 0))
                t.log.write(step, record, show=("loss", "clips_per_second"))
                if snapshot is not None:
                    warn_of_collapse(record["target_std"], run)
            if t.evaluate is not None and (last or (run.evaluate_every and step % run.evaluate_every == 0)):
                t.watchdog.report(f"evaluating after step {step}")
                with saving_on_error(t, step):
                    verdict, result = _evaluate(t, step)
                meter.pause()
            ends = last or verdict.stop
            save_if_due(t, step, vote, last=ends, best=result if verdict.improved else None)
            if verdict.stop:
                logger.info("no better evaluation for %d evaluations: stopped", run.patience)
                break
    return None


def train_step(
    engine: Any,
    snapshot: Snapshot | None,
    batch: Batch,
    *,
    with_norm: bool,
    guard: LossGuard | None = None,
    saver: Saver | None = None,
) -> tuple[Losses, Tensor | None]:
    """One micro step: targets, the student's passes, backward, and DeepSpeed's step at its boundary.

    Also the gradient's norm, `with_norm` and where DeepSpeed keeps none. `guard` looks at the loss; `saver`
    may still be copying what the step changes.
    """
    target = snapshot.encode(batch.video_BTCHW, batch.masked_BM) if snapshot is not None else None
    losses = engine(batch.video_BTCHW, batch.token_ids_BL, batch.attention_BL, batch.masked_BM, target)
    engine.backward(guard.check(losses, batch.keys) if guard else losses.total)
    norm = gradient_norm(engine) if with_norm else None
    if saver is not None:
        saver.before_update()
    engine.step()
    return losses, norm
