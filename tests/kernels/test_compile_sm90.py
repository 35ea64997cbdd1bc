"""Every kernel compiles for sm_90 at the trainer's width, without a GPU: no spills, 16-byte loads.

TRITON_INTERPRET=1 turns Triton's own library (tl.sum, tl.cdiv) into Python as well, so that nothing can be
compiled in the process of the CPU tests: this file runs itself as a program without the variable, once.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from miles_fast.kernels import (  # noqa: E402
    biased_gelu,
    cls_row,
    feature_regression,
    linear_gelu,
    residual_norm,
    space_attention,
    space_attention_kernels,
    temporal_attention,
    token_gather,
    token_index,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WIDTH, BLOCK_WIDTH = 768, 1024
HEADS, HEAD_WIDTH = 12, 64


@dataclass(frozen=True, kw_only=True)
class Compilation:
    kernel: object
    pointers: dict
    constants: dict
    num_warps: int
    max_registers: int
    num_stages: int = 3
    maxnreg: int | None = None
    vector_accesses: bool = True
    tensor_cores: bool = False


def _compilations():
    for missing_is_zero in (False, True):
        table = token_gather.LAUNCH_BACKWARD if missing_is_zero else token_gather.LAUNCH_FORWARD
        rows, num_warps = table[BLOCK_WIDTH]
        yield (
            f"gather_rows-{'backward' if missing_is_zero else 'forward'}",
            Compilation(
                kernel=token_gather._gather_rows_kernel,
                pointers={
                    "source_ptr": "*bf16",
                    "index_ptr": "*i32" if missing_is_zero else "*i64",
                    "out_ptr": "*bf16",
                },
                constants={"MISSING_IS_ZERO": missing_is_zero, "ROWS": rows, "BLOCK_D": BLOCK_WIDTH},
                num_warps=num_warps,
                max_registers=64,
            ),
        )
    yield (
        "invert",
        Compilation(
            kernel=token_index._invert_kernel,
            pointers={"index_ptr": "*i64", "inverse_ptr": "*i32"},
            constants={"BLOCK": token_index._INVERT_BLOCK},
            num_warps=4,
            max_registers=64,
            vector_accesses=False,
        ),
    )
    for indexed in (False, True):
        index = {"target_index_ptr": "*i64"} if indexed else {}
        no_index = {} if indexed else {"target_index_ptr": None}
        suffix = "indexed" if indexed else "in_order"
        rows, num_warps = feature_regression.LAUNCH_FORWARD[BLOCK_WIDTH]
        for normalization in feature_regression.NORMALIZATIONS:
            yield (
                f"compare_rows-{normalization}-{suffix}",
                Compilation(
                    kernel=feature_regression._compare_rows_kernel,
                    pointers={
                        "prediction_ptr": "*bf16",
                        "target_ptr": "*bf16",
                        "row_loss_ptr": "*fp32",
                        "row_state_ptr": "*fp32",
                        **({"prediction_index_ptr": "*i64"} if indexed else {}),
                        **index,
                    },
                    constants={
                        "NORMALIZATION": normalization,
                        "EPS": 1e-6,
                        "ROWS": rows,
                        "BLOCK_D": BLOCK_WIDTH,
                        **({} if indexed else {"prediction_index_ptr": None}),
                        **no_index,
                    },
                    num_warps=num_warps,
                    max_registers=128,
                ),
            )
        rows, num_warps = feature_regression.LAUNCH_BACKWARD[BLOCK_WIDTH]
        yield (
            f"differentiate_rows-{suffix}",
            Compilation(
                kernel=feature_regression._differentiate_rows_kernel,
                pointers={
                    "prediction_ptr": "*bf16",
                    "target_ptr": "*bf16",
                    "row_state_ptr": "*fp32",
                    "d_row_loss_ptr": "*fp32",
                    "d_prediction_ptr": "*bf16",
                    **({"inverse_ptr": "*i32"} if indexed else {}),
                    **index,
                },
                constants={
                    "ROWS": rows,
                    "BLOCK_D": BLOCK_WIDTH,
                    **({} if indexed else {"inverse_ptr": None}),
                    **no_index,
                },
                num_warps=num_warps,
                max_registers=64,
            ),
        )
    yield (
        "gelu",
        Compilation(
            kernel=biased_gelu._gelu_kernel,
            pointers={"hidden_ptr": "*bf16", "out_ptr": "*bf16"},
            constants={"BLOCK": biased_gelu._BLOCK_FORWARD},
            num_warps=8,
            max_registers=64,
        ),
    )
    rows, steps, columns, num_warps = biased_gelu.LAUNCH_BACKWARD[4096]
    halves = ("d_out_ptr", "hidden_ptr", "d_hidden_ptr")
    for sloped in (False, True):
        yield (
            f"gelu_gradient{'_of_slope' if sloped else ''}",
            Compilation(
                kernel=biased_gelu._gelu_gradient_kernel,
                pointers={**dict.fromkeys(halves, "*bf16"), "partial_ptr": "*fp32"},
                constants={"SLOPED": sloped, "ROWS": rows, "STEPS": steps, "COLUMNS": columns},
                num_warps=num_warps,
                max_registers=128,
            ),
        )
    rows, _, num_warps, stages = residual_norm.LAUNCH_BACKWARD[BLOCK_WIDTH]
    for with_total in (False, True):
        later = ["d_later_ptr"] if with_total else []
        halves = ["d_out_ptr", "total_ptr", "weight_ptr", "d_total_ptr", *later]
        yield (
            f"differentiate_norm{'_and_total' if with_total else ''}",
            Compilation(
                kernel=residual_norm._differentiate_norm_kernel,
                pointers={
                    **dict.fromkeys(halves, "*bf16"),
                    **dict.fromkeys(("mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32"),
                },
                constants={
                    "ROWS": rows,
                    "STAGES": stages,
                    "BLOCK_D": BLOCK_WIDTH,
                    **({} if with_total else {"d_later_ptr": None}),
                },
                num_warps=num_warps,
                max_registers=200,
            ),
        )
    yield from _linear_gelu_compilations()
    yield from _temporal_attention_compilations()
    yield from _space_attention_compilations()


def _linear_gelu_compilations():
    scales = {f"{name}_scale_ptr": "*fp32" for name in ("x", "weight", "out")}
    for kind, halves, launch in (
        ("", "bf16", linear_gelu.LAUNCH_FORWARD[4096]),
        ("scaled_", "fp8e4nv", linear_gelu.LAUNCH_SCALED),
    ):
        rows, columns, depth, slices, num_warps, stages = launch
        for keep in (False, True):
            yield (
                f"{kind}linear_gelu-{'training' if keep else 'snapshot'}",
                Compilation(
                    kernel=linear_gelu._linear_gelu_kernel,
                    pointers={
                        "x_desc": f"tensordesc<{halves}[{rows}, {depth}]>",
                        "weight_desc": f"tensordesc<{halves}[{columns}, {depth}]>",
                        "bias_ptr": "*bf16",
                        **{
                            f"{name}_desc": f"tensordesc<{dtype}[{rows}, {columns // slices}]>"
                            for name, dtype in (("slope", "bf16"), ("active", "bf16"), ("out", halves))
                        },
                        **(scales if kind else {}),
                    },
                    constants={
                        "BLOCK_M": rows,
                        "BLOCK_D": columns,
                        "BLOCK_K": depth,
                        "SLICES": slices,
                        "KEEP": keep,
                        "SCALED": bool(kind),
                        **({} if kind else dict.fromkeys(scales)),
                    },
                    num_warps=num_warps,
                    num_stages=stages,
                    max_registers=255,
                    vector_accesses=False,  # but for the bias and the scales, bulk copies
                    tensor_cores=True,
                ),
            )


def _temporal_attention_compilations():
    qkv = torch.empty((64, 785, 3, HEADS, HEAD_WIDTH), dtype=torch.bfloat16, device="meta")
    halves = ("qkv_ptr", "out_ptr", "d_out_ptr", "d_qkv_ptr")
    for kernel, table in (
        (temporal_attention._attend_kernel, temporal_attention.LAUNCH_FORWARD),
        (temporal_attention._differentiate_kernel, temporal_attention.LAUNCH_BACKWARD),
    ):
        _, constants = temporal_attention._launch_constants(table, qkv, 4)
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        yield (
            f"temporal_attention-{kernel.fn.__name__}",
            Compilation(
                kernel=kernel,
                pointers={name: "*bf16" if name in halves else "*fp32" for name in pointers},
                constants={
                    **{name: constants[name] for name in constants if name != "num_warps"},
                    **({"WITH_BIAS": True} if "WITH_BIAS" in kernel.arg_names else {}),
                },
                num_warps=constants["num_warps"],
                max_registers=128,
            ),
        )


def _space_attention_compilations():
    H, S, half, full = 12, 64, "*bf16", "*fp32"
    # The measured entries use the registers of 4 warps nearly whole; what must not be is a spill. Of 196
    # patches a frame's last tile can have too few rows for wgmma, of 240 it has as many as the others.
    for (name, table, pointers, max_registers), P in product(
        (
            ("attend", space_attention.LAUNCH_FORWARD, {"out_ptr": half}, 128),
            (
                "query_gradient",
                space_attention.LAUNCH_BACKWARD_QUERY,
                {"out_ptr": half, "d_out_ptr": half, "d_qkv_ptr": half},
                255,
            ),
            (
                "key_gradient",
                space_attention.LAUNCH_BACKWARD_KEY,
                {"d_out_ptr": half, "d_qkv_ptr": half},
                200,
            ),
        ),
        (196, 240),
    ):
        block_q, block_k, num_warps, stages, maxnreg = table[256, S]
        rows, columns = (block_k, block_q) if name == "key_gradient" else (block_q, block_k)
        kernel = getattr(space_attention_kernels, f"{name}_kernel")
        floats = (arg for arg in kernel.arg_names if arg.startswith(("lse", "row_starts", "cls", "bias")))
        yield (
            f"space-{name}-{P}",
            Compilation(
                kernel=kernel,
                pointers={"qkv_ptr": half, **pointers, **dict.fromkeys(floats, full)},
                constants={
                    "P": P,
                    "H": H,
                    "S": S,
                    "BLOCK_Q": block_q,
                    "BLOCK_K": block_k,
                    "LAST_ROWS": space_attention._tail(P, rows),
                    "TAIL": space_attention._tail(P, columns),
                    "BLOCK_S": S,
                    "STAGES": stages,
                    **({"WITH_BIAS": True} if "WITH_BIAS" in kernel.arg_names else {}),
                },
                num_warps=num_warps,
                max_registers=max_registers,
                maxnreg=maxnreg,
                tensor_cores=True,
            ),
        )
    for name, pointers in (
        (
            "output",
            {
                "chunk_max_ptr": full,
                "chunk_sum_ptr": full,
                "chunk_value_ptr": full,
                "out_ptr": half,
                "lse_ptr": full,
            },
        ),
        ("gradient", {"partial_ptr": full, "d_qkv_ptr": half}),
    ):
        yield (
            f"combine-{name}",
            Compilation(
                kernel=getattr(cls_row, f"_combine_{name}_kernel"),
                pointers=pointers,
                constants={"CHUNKS": cls_row._CHUNKS_PER_STEP, "BLOCK_S": S},
                num_warps=4,
                max_registers=64,
            ),
        )


COMPILATIONS = dict(_compilations())


def _compile(compilation):
    """Compile as the launcher specialises it: pointers, strides and D are multiples of 16, counts are not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = compilation.kernel
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in compilation.constants:
            signature[name] = "constexpr"
            continue
        real = name in ("weight", "scale", "d_scale")
        signature[name] = compilation.pointers.get(name, "fp32" if real else "i32")
        by_sixteen = (
            name.endswith("_ptr")
            or name in ("D", "S", "count")
            or name.endswith(("stride_clip", "stride_row"))
        )
        if by_sixteen or name in ("stride_clip", "stride_row"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=compilation.constants, attrs=attributes)
    options = {name: getattr(compilation, name) for name in ("num_warps", "num_stages", "maxnreg")}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.fixture(scope="module")
def compiled_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sm90")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    subprocess.run([sys.executable, __file__, folder], env=environment, check=True)
    return folder


@pytest.mark.parametrize("name", COMPILATIONS)
def test_compiles_for_hopper(name, compiled_folder):
    compilation = COMPILATIONS[name]
    ptx = (compiled_folder / f"{name}.ptx").read_text()
    assert re.search(r"^\.target sm_90a", ptx, flags=re.MULTILINE)
    if compilation.vector_accesses:
        assert re.search(r"ld\.global\.[\w.:]*v4\.b32", ptx), "no 16-byte loads"
    if compilation.tensor_cores:
        small = compilation.constants.get("LAST_ROWS", 64) < 64
        assert "wgmma.mma_async" in ptx and (small or "mma.sync" not in ptx), "not all products are wgmma"
    command = [CUOBJDUMP, "-res-usage", compiled_folder / f"{name}.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    assert (stack, local) == (0, 0), f"spills: {usage}"
    assert registers <= compilation.max_registers, usage


def test_every_kernel_is_compiled():
    written = {
        name
        for module in (
            token_gather,
            token_index,
            biased_gelu,
            linear_gelu,
            residual_norm,
            feature_regression,
            temporal_attention,
            space_attention,
            cls_row,
        )
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn")
    }
    assert written == {compilation.kernel.fn.__name__ for compilation in COMPILATIONS.values()}


if __name__ == "__main__":
    for name, compilation in COMPILATIONS.items():
        compiled = _compile(compilation)
        Path(sys.argv[1], f"{name}.ptx").write_text(compiled.asm["ptx"])
        Path(sys.argv[1], f"{name}.cubin").write_bytes(compiled.asm["cubin"])
