"""Fine-tune for text-video retrieval, with early stopping on a validation set.

deepspeed launch/finetune.py --ds_config launch/ds/finetune.json \\
    --config launch/configs/finetune_msrvtt.yaml --model MODEL

The loop is pre-training's with `method.view: none` (contrast on the full clip); the architecture is that of
the model it starts from. Of an official or Frozen .pth or a Hugging Face folder RUN.start becomes that model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from miles_fast.config import Config, ConfigError
from miles_fast.config_tree import load_config, to_dict
from miles_fast.distributed import barrier, configure_logging, logger, rank
from miles_fast.evaluation.validation import validation
from miles_fast.export.pretrained import Pretrained, architecture_of, is_foreign, read_pretrained
from miles_fast.export.run import write_pretrained
from miles_fast.models.storage import read_description
from miles_fast.training.checkpoint import model_folder
from miles_fast.training.ds_config import read_ds_config
from miles_fast.training.early_stopping import BEST
from miles_fast.training.engine import init_process_group, launched_ranks
from miles_fast.training.loop import pretrain
from miles_fast.training.signals import exit_with_status


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ds_config", "--deepspeed_config", required=True, help="DeepSpeed's json")
    parser.add_argument("--config", required=True, help="one of launch/configs/finetune_*.yaml, or your own")
    parser.add_argument(
        "--model", help="where to start: an exported or Hugging Face folder, a run, a checkpoint, a .pth"
    )
    parser.add_argument("--tokenizer", help="folder or name; a .pth holds none, others their own")
    parser.add_argument("--resume", help="auto, or the folder of a run or a checkpoint")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    found = None
    if options.model and is_foreign(options.model):
        found = read_pretrained(options.model, tokenizer=options.tokenizer)
    if options.tokenizer and not options.model:
        raise ConfigError("--tokenizer goes with --model; without it name model.text.tokenizer in the config")
    config = _config(options.config, options.model, found, options.overrides, options.tokenizer)
    settings = read_ds_config(
        options.ds_config, config, cuda=torch.cuda.is_available(), ranks=launched_ranks()
    )
    init_process_group()
    configure_logging()
    if found is not None:
        config, found = _convert(found, config), None
    pretrain(config, settings, resume=options.resume, evaluate=validation(config, settings.batch))
    logger.info("done: %s", f"{config.run.folder}/{BEST}" if config.run.patience else config.run.folder)
    barrier()
    torch.distributed.destroy_process_group()


def _convert(found: Pretrained, config: Config) -> Config:
    """Write foreign weights beside the run as a model folder of ours, and have the run start from it."""
    start = Path(f"{config.run.folder}.start")
    if rank() == 0:
        write_pretrained(found, "safetensors", start)
    barrier()
    text = replace(config.model.text, tokenizer=str(start / "tokenizer"))
    return replace(
        config,
        run=replace(config.run, init_from=str(start)),
        model=replace(config.model, text=text),
    )


def _config(
    path: str, model: str | None, found: Pretrained | None, overrides: list[str], tokenizer: str | None
) -> Config:
    """The config with the architecture of `model`. Raises ConfigError for one that is not a fine-tuning."""
    start = []
    if model is not None:
        if found is not None:
            architecture = to_dict(architecture_of(found))
        else:
            folder = model_folder(model)
            architecture = to_dict(read_description(folder)[0])
            architecture["text"]["tokenizer"] = tokenizer or str(folder / "tokenizer")
        start = [f"run.init_from={json.dumps(model)}", f"model={json.dumps(architecture)}"]
    try:
        config = load_config(path, [*start, *overrides])
    except ConfigError as error:
        if model is None and "key 'model' is missing" in str(error):
            raise ConfigError(f"{error}; name the model to start from with --model") from None
        raise
    pretrained = config.run.init_from or (config.model.video.weights and config.model.text.weights)
    if not pretrained:
        raise ConfigError(
            f"{path}: nothing to fine-tune; name the model with --model, or model.video.weights and "
            "model.text.weights"
        )
    if config.method.view != "none":
        raise ConfigError(
            f"{path}: method.view = {config.method.view}: fine-tuning contrasts full clips, write none; "
            "launch/pretrain.py trains the others"
        )
    return config


if __name__ == "__main__":
    exit_with_status(main)
