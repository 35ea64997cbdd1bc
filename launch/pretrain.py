"""Pre-train MILES: deepspeed launch/pretrain.py --ds_config ds.json [--config FILE] [key=value ...]"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from miles_fast.config_tree import load_config
from miles_fast.data.demo import prepare_demo
from miles_fast.distributed import barrier, configure_logging, logger, rank
from miles_fast.evaluation.validation import validation
from miles_fast.training.ds_config import read_ds_config
from miles_fast.training.engine import init_process_group, launched_ranks
from miles_fast.training.loop import pretrain
from miles_fast.training.signals import exit_with_status

ROOT = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ds_config", "--deepspeed_config", required=True, help="DeepSpeed's json")
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.yaml"), help="default: the demo's")
    parser.add_argument("--resume", help="auto, or the folder of a run or a checkpoint")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load DeepSpeed's own files (pickles: they can run any code) from a checkpoint without manifest",
    )
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    settings = read_ds_config(
        options.ds_config, config, cuda=torch.cuda.is_available(), ranks=launched_ranks()
    )
    init_process_group()
    configure_logging()
    if config.data.demo_corpus:
        if rank() == 0:
            prepare_demo(Path(config.data.demo_corpus))
        barrier()
    pretrain(
        config,
        settings,
        resume=options.resume,
        trust_checkpoint=options.trust_checkpoint,
        evaluate=validation(config, settings.batch),
    )
    logger.info("done: %s", config.run.folder)
    barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    exit_with_status(main)
