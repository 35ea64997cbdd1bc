"""Run under torch.distributed.run: losses, snapshot and weights of tiny runs for several ZeRO stages.

usage: ranks.py ROOT OUTPUT BATCH_PER_RANK STAGES   (STAGES like 0,1,2,3)
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from tiny import ds_tree, joined_masks, tiny_config  # noqa: E402

from miles_fast.data.batches import Quarantine  # noqa: E402
from miles_fast.data.loader import Loader  # noqa: E402
from miles_fast.data.order import Share  # noqa: E402
from miles_fast.distributed import barrier, rank, world_size  # noqa: E402
from miles_fast.models.dual_encoder import build_dual_encoder  # noqa: E402
from miles_fast.models.text_encoder import load_tokenizer  # noqa: E402
from miles_fast.training.engine import (  # noqa: E402
    build_engine,
    check_ds_config,
    init_process_group,
)
from miles_fast.training.loop import train_step  # noqa: E402
from miles_fast.training.objective import Objective  # noqa: E402
from miles_fast.training.snapshot import Snapshot  # noqa: E402


def full_weights(engine) -> dict[str, torch.Tensor]:
    """Whole float32 weights of the objective by name, on the CPU; all ranks must call it (ZeRO gathers)."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        source = parameter if full is None else full
        weights[name] = source.detach().float().cpu().clone()
    return weights


def run_stage(root: Path, stage: int, batch: int, steps: int = 4) -> dict:
    # Without dropout, and with the joined batch's masks dealt out, every number of ranks computes the same.
    config = tiny_config(root, method={"snapshot": {"momentum": 0.9}})
    config = replace(config, model=replace(config.model, text=replace(config.model.text, dropout=0.0)))
    settings = check_ds_config(ds_tree(stage, batch), "ds", config, cuda=False, ranks=world_size())
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.model.text.tokenizer_source)
    model = build_dual_encoder(config.model, len(tokenizer))
    objective = Objective(model, config.method, config.data.frames_per_clip)
    method = config.method
    device = torch.device("cpu")
    snapshot = Snapshot(
        objective.model,
        method.snapshot,
        method.regression,
        total_steps=steps,
        dtype=torch.float32,
        device=device,
    )
    engine = build_engine(objective, settings)

    loader = Loader(
        config.data,
        image_size=32,
        tokenizer=tokenizer,
        share=Share(batch=batch, rank=rank(), ranks=world_size()),
        seed=0,
        device=device,
        quarantine=Quarantine(None),
        draw_masks=partial(joined_masks, config, batch, rank(), world_size()),
    )
    batches, losses, norms, keys = loader.batches(0), [], [], []
    for step in range(1, steps + 1):
        item = next(batches)
        result, norm = train_step(engine, snapshot, item, with_norm=True)
        snapshot.follow(engine.module.model, step)
        values = torch.stack([value.detach().float() for value in result])
        torch.distributed.all_reduce(values)
        losses.append((values / world_size()).tolist()[:3])
        norms.append(float(engine.get_global_grad_norm() if norm is None else norm))
        keys.append(list(item.keys))
    batches.close()
    weights = full_weights(engine)
    return {
        "losses": losses,
        "norms": norms,
        "keys": keys,
        "weights": {name: tensor.double().sum().item() for name, tensor in weights.items()},
        "snapshot": {name: tensor.double().sum().item() for name, tensor in snapshot.state_dict().items()},
    }


if __name__ == "__main__":
    root, output, batch, stages = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    init_process_group()
    results = {stage: run_stage(root, int(stage), batch) for stage in stages.split(",")}
    (output / f"rank{rank()}.json").write_text(json.dumps(results))
    barrier()
    torch.distributed.destroy_process_group()
