"""The video encoder: a ViT with divided space-time attention under the published key names.

Source: the released encoder of MILES, equal to Frozen-in-Time's (spec/miles.md 1.1, 7.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles_fast.config import VideoEncoderConfig
from miles_fast.kernels.fp8_linear import fp8_linear
from miles_fast.kernels.fp8_mlp import fp8_mlp
from miles_fast.kernels.linear import linear
from miles_fast.kernels.mlp import mlp
from miles_fast.kernels.residual_norm import residual_norm, takes_biases
from miles_fast.kernels.token_gather import token_gather
from miles_fast.models.attention import Axis, divided_attention, require_backend, takes_bias
from miles_fast.models.compilation import compile_each, inductor_within


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DividedAttention(nn.Module):
    """Packed qkv, attention along one axis, output projection: (B, N, D) -> (B, N, D), or (B, M, D)."""

    def __init__(self, width: int, heads: int, axis: Axis, backend: str) -> None:
        super().__init__()
        self.heads, self.axis, self.backend, self.fp8 = heads, axis, backend, False
        self.qkv = _Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x_BND: Tensor,
        num_frames: int,
        rows_BM: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        bias_gets_gradient: bool = True,
    ) -> Tensor:
        """`bias_gets_gradient`: proj's, from here; else the `residual_norm` behind gives it.

        Added to a `residual` of the output's shape, if there is one.
        """
        parted = takes_bias(x_BND, self.backend)
        if self.fp8 or parted:
            compute = fp8_linear if self.fp8 else linear
            qkv_BND = compute(x_BND, self.qkv.weight, self.qkv.bias.detach() if parted else self.qkv.bias)
        else:
            qkv_BND = self.qkv(x_BND)
        qkv_BN3HS = qkv_BND.unflatten(-1, (3, self.heads, -1))
        query_bias = self.qkv.bias.chunk(3)[0] if parted else None
        attended_BND = divided_attention(qkv_BN3HS, num_frames, self.axis, self.backend, query_bias)
        if rows_BM is not None:
            attended_BND = _rows(attended_BND, rows_BM)
        bias = self.output_bias(x_BND) if bias_gets_gradient else self.proj.bias.detach()
        return linear(attended_BND, self.proj.weight, bias, residual)

    def output_bias(self, x_BND: Tensor) -> Tensor:
        """proj's bias; where attention gives only the queries' bias its gradient, the values' gets it here.

        A bias of the values is one of the output: weights add up to 1. One of the keys changes nothing.
        """
        if not takes_bias(x_BND, self.backend):
            return self.proj.bias
        return _WithValueBias.apply(self.proj.bias, self.proj.weight, self.qkv.bias.chunk(3)[2])


class _WithValueBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bias_D: Tensor, weight_DD: Tensor, value_bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(weight_DD)
        return bias_D.view_as(bias_D)

    @staticmethod
    def backward(ctx, d_bias_D: Tensor) -> tuple[Tensor, None, Tensor]:
        (weight_DD,) = ctx.saved_tensors
        return d_bias_D, None, d_bias_D @ weight_DD


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.fp8 = False

    def forward(self, x: Tensor, residual: Tensor, *, bias_gets_gradient: bool = True) -> Tensor:
        """residual + the layers of x. `bias_gets_gradient`: fc2's, as in `DividedAttention.forward`."""
        bias = self.fc2.bias if bias_gets_gradient else self.fc2.bias.detach()
        compute = fp8_mlp if self.fp8 else mlp
        return compute(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, bias, residual)


class Block(nn.Module):
    """Frozen-in-Time's wiring: the spatial residual is the block's input, not the temporal branch."""

    def __init__(self, config: VideoEncoderConfig, backend: str) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = DividedAttention(width, config.heads, "space", backend)
        self.timeattn = DividedAttention(width, config.heads, "time", backend)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.norm3 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BND: Tensor, num_frames: int, rows_BM: Tensor | None = None) -> Tensor:
        """(B, N, D), or only the rows `rows_BM` of it: behind attention no row needs another."""
        own = not takes_biases(x_BND)
        total = self.timeattn(self.norm3(x_BND), num_frames, residual=x_BND, bias_gets_gradient=own)
        biases = None if own else (self.timeattn.output_bias(x_BND),)
        normed, _ = _normalize(total, self.norm1, biases, with_total=False)
        if rows_BM is not None:
            x_BND = _rows(x_BND, rows_BM)
        space = self.attn(normed, num_frames, rows_BM, residual=x_BND, bias_gets_gradient=own)
        biases = None if own else (self.attn.output_bias(x_BND), self.mlp.fc2.bias)
        normed, space = _normalize(space, self.norm2, biases)
        return self.mlp(normed, space, bias_gets_gradient=own)


def _rows(x_BND: Tensor, rows_BM: Tensor) -> Tensor:
    """Of rows in one list, (1, M), the clips' tokens are one clip's."""
    return token_gather(x_BND.reshape(len(rows_BM), -1, x_BND.shape[-1]), rows_BM)


def _normalize(
    total: Tensor, norm: nn.LayerNorm, biases: tuple[Tensor, ...] | None, *, with_total: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(norm(total), total), which gives `biases` their gradients too."""
    if biases is None:
        return norm(total), total
    return residual_norm(total, norm.weight, norm.bias, *biases, eps=norm.eps, with_total=with_total)


class PatchEmbedding(nn.Module):
    """Convolution with stride = kernel = patch: (B, T, C, H, W) -> (B, T * P, D).

    Computed as one matrix product over the patches' pixels, which needs no other memory layout; `proj` is a
    convolution for its published name and shape.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        size = self.proj.kernel_size[0]
        video = video_BTCHW.to(self.proj.weight.dtype)
        grid = video.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # B T C rows size columns size
        patches = grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def initialize_linear_layers(module: nn.Module) -> None:
    """ViT's: weights from a normal distribution of 0.02, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class SpaceTimeTransformer(nn.Module):
    """Encodes clips of any number of frames; `temporal_embed` is interpolated beyond its own rows."""

    def __init__(self, config: VideoEncoderConfig, attention: str = "auto") -> None:
        super().__init__()
        require_backend(attention)
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, config.num_frames, width))
        self.patch_embed = PatchEmbedding(config.patch_size, width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._initialize()

    def _initialize(self) -> None:
        initialize_linear_layers(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.initialize_temporal_branch()

    @torch.no_grad()
    def initialize_temporal_branch(self) -> None:
        """Start the temporal branch from the spatial one's present weights, as `temporal_init` says.

        `identity` (inferred): qkv copied from the spatial qkv, proj zero, so that the encoder equals its
        image ViT at first and every weight trains. `zeros`: Frozen's, whose q and k never receive a gradient
        (spec/miles.md 1.1). `random`: the released class's default.
        """
        for block in self.blocks:
            qkv, proj = block.timeattn.qkv, block.timeattn.proj
            if self.config.temporal_init == "identity":
                qkv.load_state_dict(block.attn.qkv.state_dict())
                nn.init.zeros_(proj.weight)
            elif self.config.temporal_init == "zeros":
                nn.init.zeros_(qkv.weight)
                nn.init.zeros_(qkv.bias)
                nn.init.ones_(proj.weight)
            else:
                qkv.reset_parameters()
                proj.reset_parameters()
                continue
            nn.init.zeros_(proj.bias)

    def forward(
        self,
        video_BTCHW: Tensor,
        *,
        masked_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
        with_unmasked: bool = False,
        visible_BK: Tensor | None = None,
        rows_BM: Tensor | None = None,
    ) -> Tensor:
        """Tokens after the final LayerNorm, (B, N, D), or only those at `rows_BM`, (B, M, D).

        `masked_BN` (bool, patches only: N = T * P) are replaced by `mask_token` before the position embedding
        (BEiT's convention, inferred). `with_unmasked` appends the same clips unmasked to the batch (view B):
        (2 B, ...), one patch embedding for both. `visible_BK` names the only patches that are encoded (view
        D: the same positions in every frame, ascending; N is then 1 + K). `rows_BM` counts [CLS] as 0 and
        must be distinct within a clip; (1, M) counts on from clip to clip, for clips of which other rows, or
        other numbers of them, are wanted.
        """
        num_frames = video_BTCHW.shape[1]
        x_BND = self.embed(video_BTCHW, masked_BN, mask_token, with_unmasked)
        if visible_BK is not None:
            x_BND = token_gather(x_BND, F.pad(visible_BK + 1, (1, 0)))
        *blocks, last = self.blocks
        for block in blocks:
            x_BND = block(x_BND, num_frames)
        return self.norm(last(x_BND, num_frames, rows_BM))

    def embed(
        self,
        video_BTCHW: Tensor,
        masked_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
        with_unmasked: bool = False,
    ) -> Tensor:
        """Tokens before the first block, (B, N, D) or (2 B, N, D), with their positions; as in `forward`."""
        patches_BND = self.patch_embed(video_BTCHW)
        if masked_BN is not None:
            assert mask_token is not None
            masked = torch.where(masked_BN[..., None], mask_token.to(patches_BND.dtype), patches_BND)
            patches_BND = torch.cat([masked, patches_BND]) if with_unmasked else masked
        batch, _, width = patches_BND.shape
        frames_TD = self.temporal_table(video_BTCHW.shape[1])
        table_TPD = self.pos_embed[0, None, 1:] + frames_TD[:, None]
        cls_1D = self.cls_token[0] + self.pos_embed[0, :1]
        tokens_BND = patches_BND + table_TPD.flatten(0, 1)
        return torch.cat([cls_1D.expand(batch, 1, width), tokens_BND], dim=1)

    def compile_layers(self, memory_budget: float = 1.0) -> None:
        """Have the embedding, the layers and the last norm compiled when they first run, anew for each shape.

        A layer at a time: all share one compilation. The whole tower takes four times as long to compile.
        What `memory_budget` means: RunConfig.activation_memory_budget.
        """
        self.embed = torch.compile(self.embed, dynamic=False, backend=inductor_within(memory_budget))
        compile_each([*self.blocks, self.norm], memory_budget)

    def temporal_table(self, num_frames: int) -> Tensor:
        """Rows of `temporal_embed` for a clip, (T, D): the first T, or interpolated linearly beyond them."""
        return temporal_rows(self.temporal_embed[0], num_frames)


def temporal_rows(table_TD: Tensor, num_frames: int) -> Tensor:
    """A temporal table of `num_frames` rows: the first ones, or interpolated linearly beyond its own."""
    if num_frames <= table_TD.shape[0]:
        return table_TD[:num_frames]
    return F.interpolate(table_TD.T[None], size=num_frames, mode="linear", align_corners=False)[0].T
