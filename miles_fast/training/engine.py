"""DeepSpeed: the process group, and the engine around the objective."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from miles_fast.config import ConfigError
from miles_fast.distributed import note_once, world_size
from miles_fast.models.video_encoder import PatchEmbedding
from miles_fast.training.ds_config import EngineSettings

# What DeepSpeed's json may say of how gradients are summed over the ranks.
_REDUCTION_KEYS = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor")


def launched_ranks() -> int:
    """Number of ranks that the launcher starts; they need not have met."""
    _name_ranks_of_srun()
    return int(os.environ.get("WORLD_SIZE", 1))


def _name_ranks_of_srun() -> None:
    # srun starts the ranks itself (deepspeed --launcher slurm) and names them its own way.
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        os.environ.update({name: os.environ[slurm] for name, slurm in names.items()})
        os.environ.setdefault("MASTER_PORT", "29500")


def init_process_group() -> torch.device:
    """Join the process group that the launcher set up (or a group of one) and return this rank's device."""
    _name_ranks_of_srun()
    if "RANK" not in os.environ:
        # Port 0: the system chooses, so that no other process can take it first.
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()})
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not cuda:
        # Only inference uses this operator; init_distributed would spend half a minute compiling it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def build_engine(objective: nn.Module, settings: EngineSettings) -> Any:
    """DeepSpeed engine around the objective; weight decay spares biases, norms, tokens and positions."""
    import deepspeed
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.config import DeepSpeedConfigError

    # Six times at ZeRO 1 it would have Python look for garbage (0.4 s) and print what memory is in use.
    bf16_optimizer.see_memory_usage = lambda message, force=False: None

    if settings.stage == 0 and settings.bf16:
        note_once("bf16 with ZeRO 0: DeepSpeed takes a zero-gradient step at the start; stage 1 does not")
    groups = parameter_groups(objective, settings)
    if settings.stage == 3:
        gather_by_layer(objective)
    try:
        engine, *_ = deepspeed.initialize(model=objective, model_parameters=groups, config=settings.tree)
    except (ValueError, NotImplementedError, AssertionError, TypeError, DeepSpeedConfigError) as error:
        # By TypeError it refuses an option that an optimizer or a schedule does not have.
        cause = str(error) or type(error).__name__
        raise ConfigError(f"{settings.source}: DeepSpeed refuses it: {cause}") from error
    if settings.stage == 3:
        gather_patches(objective)
        keep_compiler_from_hooks(objective)
    assert engine.train_batch_size() == settings.batch * settings.accumulation * world_size()
    if settings.stage == 0 and not settings.bf16:
        _skip_non_finite(engine.optimizer)
    use_flat_gradients(engine.optimizer, in_parts=not any(key in settings.tree for key in _REDUCTION_KEYS))
    measure_gradients_together(engine.optimizer)
    return engine


def release_engine(engine: Any) -> None:
    """Take DeepSpeed's hooks off the weights: they keep the engine, and its memory, for the process' life."""
    from deepspeed.runtime.zero import parameter_offload

    # It waits for the GPU: where that has failed, what failed first is what is to be told.
    with contextlib.suppress(RuntimeError):
        engine.destroy()
    # ZeRO 3 puts every engine's module there for good.
    modules = getattr(parameter_offload, "FWD_MODULE_STACK", [])
    modules[:] = [module for module in modules if module is not engine.module]


def parameter_groups(objective: nn.Module, settings: EngineSettings) -> list[dict[str, Any]]:
    """Trained weights by learning rate and weight decay, those of the json's own rate first.

    Raises ConfigError for a prefix of run.lr_scale that begins no trained weight's name.
    """
    scales: dict[str, float] = settings.lr_scale
    used: set[str | None] = set()
    parts: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            published = name.removeprefix("model.")
            prefix = max((p for p in scales if published.startswith(p)), key=len, default=None)
            used.add(prefix)
            scale = 1.0 if prefix is None else scales[prefix]
            parts.setdefault((scale, parameter.ndim in (2, 4)), []).append(parameter)
    if unused := sorted(scales.keys() - used):
        raise ConfigError(
            f"run.lr_scale: no trained weight's name begins with {unused[0]!r}, or a longer prefix takes all"
        )
    groups = []
    for (scale, decayed), parameters in parts.items():
        if parameters:
            own = {} if scale == 1 else {"lr": scale * settings.tree["optimizer"]["params"]["lr"]}
            groups.append({"params": parameters} | own | ({} if decayed else {"weight_decay": 0.0}))
    return groups


def gather_by_layer(objective: nn.Module) -> None:
    """Have ZeRO-3 gather a layer's weights together, and leave what happens in a layer to the compiler.

    Of every single module it would gather them in a hook, behind which a compiled layer does not find what
    one module reads of another.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layers in objective.modules():
        if isinstance(layers, nn.ModuleList):
            for layer in layers:
                set_z3_leaf_module(layer, True)


def gather_patches(objective: nn.Module) -> None:
    """Have ZeRO-3 gather the patches' convolution for the module that reads its weights.

    As a layer it would be let go too early: its input has no gradient.
    """
    import deepspeed

    for module in objective.modules():
        if isinstance(module, PatchEmbedding):
            for weight in module.proj.parameters():
                deepspeed.zero.register_external_parameter(module, weight)


def keep_compiler_from_hooks(objective: nn.Module) -> None:
    """Have torch.compile leave ZeRO-3's hooks alone.

    They differ from module to module: it would compile them again for each, and give up after eight.
    """
    for module in objective.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            hooks.update({place: torch.compiler.disable(hook) for place, hook in hooks.items()})


def use_flat_gradients(optimizer: Any, *, in_parts: bool) -> None:
    """Have BF16_Optimizer treat the gradient as what it keeps it as, one flat buffer a parameter group.

    It copies, measures and clips parameter by parameter, five launches for each of three hundred; its norm,
    its clipping and its update are the same over the buffers. Other optimizers are left as they are.

    `in_parts`: it is averaged over the ranks in float32, each rank getting the part that it updates. Else
    DeepSpeed rounds it to the json's communication_data_type (bf16) and sums all of it on every rank.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if (
        not isinstance(optimizer, BF16_Optimizer)
        or optimizer.has_moe_layers
        or optimizer.immediate_grad_update
    ):
        return
    flat = optimizer.fp32_groups_gradients_flat
    pairs = [
        (parameter, wide.view_as(parameter), group, place)
        for group, parameters in enumerate(optimizer.bf16_groups)
        for place, (parameter, wide) in enumerate(
            zip(parameters, optimizer.fp32_groups_gradients[group], strict=True)
        )
    ]

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        used = [pair for pair in pairs if pair[0].grad is not None]
        held = optimizer.fp32_groups_has_gradients
        first = [pair for pair in used if not held[pair[2]][pair[3]]]
        later = [pair for pair in used if held[pair[2]][pair[3]]]
        for update, some in ((torch._foreach_copy_, first), (torch._foreach_add_, later)):
            if some:
                update([wide for _, wide, *_ in some], [parameter.grad for parameter, *_ in some])
        for parameter, wide, group, place in used:
            parameter._hp_grad = wide
            held[group][place] = True
        if clear_lp_grads:
            optimizer.clear_lp_grads(set_to_none=True)

    optimizer.update_hp_grads = update_hp_grads
    optimizer.get_grads_for_norm = lambda for_clipping=False: flat if for_clipping else (flat, {})
    # Over one rank it would join all gradients, round them to bf16 and copy them back, for nothing.
    optimizer.get_grads_for_reduction = lambda: (flat if world_size() > 1 else [], {})
    if in_parts and world_size() > 1:
        _reduce_in_parts(optimizer)
    # Without a gradient to add to, backward hands its own over.
    optimizer.backward_prologue = partial(optimizer.clear_lp_grads, set_to_none=True)


def _reduce_in_parts(optimizer: Any) -> None:
    whole, parts = optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_gradient_flat_partition
    averages = whole[0].is_cuda  # gloo can only sum
    operation = torch.distributed.ReduceOp.AVG if averages else torch.distributed.ReduceOp.SUM

    def get_grads_for_reduction() -> Any:
        for gradient, part, group in zip(whole, parts, optimizer.real_dp_process_group, strict=True):
            torch.distributed.reduce_scatter_tensor(part, gradient, operation, group)
            if not averages:
                part.div_(world_size())
        return [], {}

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return parts
        squared = torch.stack([part.norm() for part in parts]).square().sum()
        torch.distributed.all_reduce(squared)
        return [squared.sqrt()], {}

    optimizer.get_grads_for_reduction = get_grads_for_reduction
    optimizer.get_grads_for_norm = get_grads_for_norm


def measure_gradients_together(optimizer: Any) -> None:
    """Have ZeRO 1 to 3 find what is not finite, and the norm, in a few launches.

    DeepSpeed does so gradient by gradient, up to twenty launches for each of three hundred, while the GPU
    waits. Its norm is of float64, this one of float32. BF16_Optimizer has `use_flat_gradients`.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        together = not (optimizer.cpu_offload or optimizer.has_moe_layers)
    else:
        together = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer
    if not together:
        return

    def has_overflow_partitioned_grads_serial() -> Tensor:
        groups = range(len(optimizer.bit16_groups))
        gradients = itertools.chain.from_iterable(optimizer.averaged_gradients[group] for group in groups)
        return ~joined_norms(gradients, math.inf, optimizer.device).isfinite().all()[None]

    def get_grad_norm_direct(gradients: list[Tensor], params: list[Tensor]) -> Tensor:
        squared = joined_norms(gradients, 2, optimizer.device).square().sum()
        torch.distributed.all_reduce(squared, group=optimizer.dp_process_group)
        return torch.where(squared.isfinite(), squared.sqrt(), -1.0)  # what DeepSpeed makes of it, too

    if isinstance(optimizer, DeepSpeedZeroOptimizer):  # in bf16 ZeRO 3 tells by the norm
        optimizer.has_overflow_partitioned_grads_serial = has_overflow_partitioned_grads_serial
    optimizer.get_grad_norm_direct = get_grad_norm_direct


def joined_norms(gradients: Iterable[Tensor | None], order: float, device: torch.device | str) -> Tensor:
    """Norms in float32 of what is there and not empty, not finite where that is not, and a zero."""
    there = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
    found = torch._foreach_norm(there, order, torch.float32) if there else ()
    return torch.stack([torch.zeros((), device=device), *found])


def _skip_non_finite(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer leave out, and DeepSpeed count, steps whose gradient is not finite.

    DeepSpeed does so itself but in float32 at ZeRO 0, where it steps torch's optimizer with any gradient.
    """
    step = optimizer.step

    def step_if_finite() -> None:
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        optimizer.overflow = not torch.nn.utils.get_total_norm(gradients).isfinite().item()
        if not optimizer.overflow:
            step()

    optimizer.step = step_if_finite


def gradient_norm(engine: Any) -> Tensor | None:
    """Norm of the whole gradient between backward and step, where DeepSpeed keeps none: fp32 at ZeRO 0.

    Elsewhere None: `engine.get_global_grad_norm()` has it after the step. Ranks agree: ZeRO 0 has
    summed the gradients by then.
    """
    if engine.zero_optimization_stage() or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
