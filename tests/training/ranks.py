"""One rank (RANK, WORLD_SIZE and so on are set): losses, snapshot and weights of tiny runs at ZeRO stages.

usage: ranks.py ROOT OUTPUT BATCH_PER_RANK RUNS   (RUNS as 0,1,2x2,3b: ZeRO stage [x accumulation] [b: bf16])
"""

import contextlib
import faulthandler
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from tiny import FLOAT32_SUMS, NOTHING_STAYS, ds_tree, joined_masks, tiny_config  # noqa: E402

from miles_fast.config import ContrastConfig  # noqa: E402
from miles_fast.data.batches import Quarantine  # noqa: E402
from miles_fast.data.loader import Loader  # noqa: E402
from miles_fast.data.order import Share  # noqa: E402
from miles_fast.distributed import (  # noqa: E402
    barrier,
    gather_objects,
    rank,
    start_gather,
    sum_over_ranks,
    world_size,
)
from miles_fast.models.dual_encoder import build_dual_encoder  # noqa: E402
from miles_fast.models.text_encoder import load_tokenizer  # noqa: E402
from miles_fast.training import engine as engine_module  # noqa: E402
from miles_fast.training.ds_config import check_ds_config  # noqa: E402
from miles_fast.training.engine import build_engine, init_process_group, release_engine  # noqa: E402
from miles_fast.training.loop import train_step  # noqa: E402
from miles_fast.training.losses import contrastive_loss  # noqa: E402
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


def contrastive_gradient(batch: int, device: torch.device) -> list:
    """Gradient of two projections through the contrast, averaged over ranks as DeepSpeed does, in float64."""
    draw = torch.Generator().manual_seed(5)
    joined = torch.randn(2, world_size() * batch, 8, generator=draw, dtype=torch.float64)
    projections = torch.randn(2, 8, 4, generator=draw, dtype=torch.float64).to(device).requires_grad_()
    own = joined[:, rank() * batch : (rank() + 1) * batch].to(device) @ projections
    contrastive_loss(own[0], own[1], ContrastConfig()).backward()
    return (sum_over_ranks(projections.grad) / world_size()).tolist()


def milliseconds_beside_gather() -> list[float]:
    """From the start of a gather of 64 MiB a rank to the end of another operator, and to its own."""
    rows, other = torch.zeros(2**24, device="cuda"), torch.zeros(2**10, device="cuda")
    start_gather(rows)()  # NCCL sets itself up
    torch.cuda.synchronize()
    barrier()
    begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda._sleep(10**8)  # so that the host has called all of it before the GPU begins
    begin.record()
    finish = start_gather(rows)
    other.add_(1)
    middle.record()
    finish()
    end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(middle), begin.elapsed_time(end)]


def processes_here() -> list[int]:
    """Ids of those that hold a context on the current GPU; NVML must be there."""
    import pynvml

    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from driver import driver_handle

    return [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(driver_handle())]


def bf16_run(root: Path, device: torch.device, *, flat: bool) -> dict:
    """Norms and weights of a small net under BF16_Optimizer, its gradient flat or DeepSpeed's own way."""
    tree = ds_tree(stage=1, batch=2, bf16=True) | FLOAT32_SUMS
    tree |= {"gradient_clipping": 0.1} | ({} if flat else {"communication_data_type": "fp32"})
    settings = check_ds_config(tree, "ds", tiny_config(root), cuda=device.type == "cuda", ranks=world_size())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with contextlib.nullcontext() if flat else mock.patch.object(engine_module, "use_flat_gradients"):
        engine = build_engine(net, settings)
    draw, norms = torch.Generator().manual_seed(rank()), []
    for _ in range(4):
        x = torch.randn(2, 6, generator=draw).to(device, torch.bfloat16)
        engine.backward(engine(x).float().square().sum())
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    weights = {name: tensor.tolist() for name, tensor in full_weights(engine).items()}
    release_engine(engine)
    return {"norms": norms, "weights": weights}


class Reference:
    """The snapshot's average by its definition, of whole weights."""

    def __init__(self, student: nn.Module) -> None:
        self.average = {name: p.detach().double() for name, p in self._followed(student)}

    @staticmethod
    def _followed(student: nn.Module) -> list[tuple[str, nn.Parameter]]:
        found = student.named_parameters()
        return [(name, p) for name, p in found if name.startswith(("video_model.", "vid_proj."))]

    def follow(self, student: nn.Module, momentum: float) -> None:
        import deepspeed

        for name, weight in self._followed(student):
            partitioned = hasattr(weight, "ds_id")
            with deepspeed.zero.GatheredParameters([weight]) if partitioned else contextlib.nullcontext():
                whole = weight.detach().double().cpu()
            self.average[name] = momentum * self.average[name] + (1 - momentum) * whole

    def distances(self, snapshot: Snapshot) -> list[float]:
        """Of the ranks' joined averages, and of what computes on this one, to it."""
        own = {name: tensor.cpu().flatten() for name, tensor in snapshot.state_dict().items()}
        states = gather_objects(own) if snapshot.shared else [own]
        used = dict(snapshot.video_model.named_parameters(prefix="video_model"))
        averaged, computing = [], []
        for name, tensor in self.average.items():
            joined = torch.cat([state[name] for state in states if name in state]).view(tensor.shape)
            averaged.append((joined - tensor).abs().max().item())
            if name in used:
                computing.append((used[name].cpu() - joined).abs().max().item())
        return [max(averaged), max(computing)]


def run_stage(
    root: Path, stage: int, accumulation: int, batch: int, device: torch.device, *, bf16: bool
) -> dict:
    # Without dropout, and with the joined batch's masks dealt out, every number of ranks computes the same.
    config = tiny_config(root, method={"snapshot": {"momentum": 0.9}})
    config = replace(config, model=replace(config.model, text=replace(config.model.text, dropout=0.0)))
    tree, steps = ds_tree(stage, batch, accumulation, bf16), 4
    tree["zero_optimization"]["reduce_bucket_size"] = 10**6  # DeepSpeed's default takes GiBs a run
    if accumulation > 1:
        tree["zero_optimization"] |= NOTHING_STAYS
    settings = check_ds_config(tree, "ds", config, cuda=device.type == "cuda", ranks=world_size())
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.model.text.tokenizer_source)
    model = build_dual_encoder(config.model, len(tokenizer))
    objective = Objective(model, config.method, config.data.frames_per_clip)
    method = config.method
    snapshot = Snapshot(
        objective.model,
        method.snapshot,
        method.regression,
        total_steps=steps,
        dtype=settings.dtype,
        device=device,
        shared=stage == 3,
    )
    reference = Reference(objective.model)
    engine = build_engine(objective, settings)

    loader = Loader(
        config.data,
        image_size=32,
        tokenizer=tokenizer,
        share=Share(batch=batch, accumulation=accumulation, rank=rank(), ranks=world_size()),
        seed=0,
        device=device,
        quarantine=Quarantine(None),
        draw_masks=partial(joined_masks, config, batch, rank(), world_size()),
    )
    batches, losses, norms, keys = loader.batches(0), [], [], []
    for step in range(1, steps + 1):
        for _ in range(accumulation):
            item = next(batches)
            result, norm = train_step(engine, snapshot, item, with_norm=True)
            values = torch.stack([value.detach().float() for value in result])
            losses.append((sum_over_ranks(values) / world_size()).tolist()[:3])
            keys.append(list(item.keys))
        snapshot.follow(engine.module.model, step)
        reference.follow(engine.module.model, snapshot.momentum(step))
        norms.append(float(engine.get_global_grad_norm() if norm is None else norm))
    batches.close()
    weights = full_weights(engine)
    return {
        "losses": losses,
        "norms": norms,
        "keys": keys,
        "weights": {name: tensor.double().sum().item() for name, tensor in weights.items()},
        "snapshot": {name: tensor.sum().item() for name, tensor in reference.average.items()},
        "snapshot's distances": reference.distances(snapshot),
    }


def main() -> None:
    root, output, batch, runs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")
    faulthandler.dump_traceback_later(250)  # the test waits 280 s: for whoever asks where a rank was
    device = init_process_group()
    torch.backends.cudnn.allow_tf32 = False  # the patches' convolution, which is to be as exact as the rest
    results: dict = {
        "device": device.type,
        "contrastive gradient": contrastive_gradient(batch, device),
        "bf16 flat": bf16_run(root, device, flat=True),
        "bf16": bf16_run(root, device, flat=False),
    }
    for run in runs:
        stage, _, accumulation = run.removesuffix("b").partition("x")
        halves = run.endswith("b")
        results[run] = run_stage(root, int(stage), int(accumulation or 1), batch, device, bf16=halves)
    if device.type == "cuda":
        results["beside gather"] = milliseconds_beside_gather()
        results["processes"] = processes_here()
    (output / f"rank{rank()}.json").write_text(json.dumps(results))
    barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
