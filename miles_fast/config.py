"""Every option of a run, as frozen dataclasses; `config_tree` reads them from YAML.

What DeepSpeed's json decides (batch sizes, optimizer, schedule, precision, ZeRO, clipping) is not repeated
here. Defaults are the recommended ones of the method; those that the paper does not state are marked
inferred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator
from pydantic.dataclasses import dataclass

_OPTIONS: dict[str, Any] = {
    "frozen": True,
    "kw_only": True,
    "config": ConfigDict(extra="forbid", allow_inf_nan=False),
}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names file, key, value and remedy."""


@dataclass(**_OPTIONS)
class SourceConfig:
    """One set of tar shards; `shards` are glob or brace patterns, relative to the working directory.

    `weight` is the set's share of the optimizer steps, against the weights of the other training sets.
    """

    shards: list[str] = Field(min_length=1)
    name: str = "train"
    weight: float = Field(default=1.0, gt=0)


@dataclass(**_OPTIONS)
class DataConfig:
    """Where clips come from and what is drawn of them.

    Several `train` sources take turns, one optimizer step each (spec/miles.md 4.2), in proportion to their
    weights. Each `evaluation` set needs a name of its own: results are kept by it. `demo_corpus` is a folder
    in which the generated corpus is built when it is missing. A run whose share of unusable samples exceeds
    `max_bad_share` stops.

    `crop_scale`: the least and the greatest share of a frame's area that a training crop takes.

    `shuffle_shards`: each epoch goes through a set in windows of that many shards and shuffles the samples of
    a window together; 0 shuffles all samples of the set. Unset it is 0 for local sets and 16 for remote ones.

    `jpeg_decoder`: cpu takes about 0.45 ms of one of the `threads` for an image of 456 x 256, and the step of
    a ViT-B is 1 to 4 % faster: nvjpeg launches two kernels for every image, which share the GPU and its power
    with those of the step. nvjpeg decodes more on few cores.

    `allowed_prefixes`: what URLs of shards (https, http, s3) may start with; none are allowed by default.
    Remote shards are read through `cache_folder` (default: miles_fast/shards in the user's cache folder),
    which holds at most `cache_gib`: two windows of every remote set must fit. A download that fails
    or makes no progress for `download_timeout_seconds` is tried `download_attempts` times.
    """

    train: list[SourceConfig] = Field(min_length=1)
    evaluation: list[SourceConfig] = Field(default_factory=list)
    demo_corpus: str | None = None
    shuffle_shards: int | None = Field(default=None, ge=0)
    allowed_prefixes: list[str] = Field(default_factory=list)
    s3_endpoint: str | None = None
    cache_folder: str | None = None
    cache_gib: float = Field(default=64.0, gt=0)
    download_attempts: int = Field(default=6, ge=1)
    download_timeout_seconds: float = Field(default=30.0, gt=0)
    frames_per_clip: int = Field(default=4, ge=1)
    caption_tokens: int = Field(default=32, ge=3)
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: float = Field(default=0.5, ge=0, le=1)
    augmentation: Literal["auto", "dali", "pil"] = "auto"
    jpeg_decoder: Literal["nvjpeg", "cpu"] = "nvjpeg"
    video_decoder: Literal["cpu", "nvdec"] = "cpu"
    decode_workers: int = Field(default=4, ge=1)
    max_bad_share: float = Field(default=0.75, ge=0, le=1)
    threads: int = Field(default=4, ge=1)
    prefetch_batches: int = Field(default=3, ge=1)

    @field_validator("evaluation")
    @classmethod
    def _names_differ(cls, sources: list[SourceConfig]) -> list[SourceConfig]:
        for name, count in Counter(source.name for source in sources).items():
            if count > 1:
                raise ValueError(
                    f"{count} sets have the name {name!r}, and results are kept by name; give each a name of "
                    "its own"
                )
        return sources

    @field_validator("crop_scale")
    @classmethod
    def _shares_rise(cls, scale: tuple[float, float]) -> tuple[float, float]:
        low, high = scale
        if not 0 < low <= high <= 1:
            raise ValueError("the least and the greatest share of the area: write 0 < least <= greatest <= 1")
        return scale


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}; change one of them")


@dataclass(**_OPTIONS)
class VideoEncoderConfig:
    """Divided space-time ViT; the defaults are the published ViT-B/16 (spec/miles.md 1.1).

    `num_frames` is the number of rows of `temporal_embed`; clips of any other length run too. `weights` is a
    timm model name or a local .safetensors file with an image ViT of the same sizes.
    """

    image_size: int = Field(default=224, ge=1)
    patch_size: int = Field(default=16, ge=1)
    width: int = Field(default=768, ge=1)
    depth: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    num_frames: int = Field(default=4, ge=1)
    temporal_init: Literal["identity", "zeros", "random"] = "identity"
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        _check_heads(self.width, self.heads)

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size


@dataclass(**_OPTIONS)
class TextEncoderConfig:
    """DistilBERT: `weights` (a model name or a local folder), or fresh from the sizes below.

    `tokenizer` is a name or a folder; empty means `weights`. The vocabulary's size is the tokenizer's.
    """

    weights: str | None = None
    tokenizer: str | None = None
    width: int = Field(default=768, ge=1)
    depth: int = Field(default=6, ge=1)
    heads: int = Field(default=12, ge=1)
    hidden: int = Field(default=3072, ge=1)
    max_positions: int = Field(default=512, ge=3)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    def __post_init__(self) -> None:
        if self.weights is None and self.tokenizer is None:
            raise ValueError("needs `weights` (a name or folder with its tokenizer) or a `tokenizer` folder")
        if self.weights is None:
            _check_heads(self.width, self.heads)

    @property
    def tokenizer_source(self) -> str:
        """Name or folder that the tokenizer is loaded from."""
        return self.tokenizer or self.weights or ""


@dataclass(**_OPTIONS)
class ModelConfig:
    """The dual encoder: both towers, the shared embedding width, and the attention backend."""

    text: TextEncoderConfig
    video: VideoEncoderConfig = Field(default_factory=VideoEncoderConfig)
    embedding: int = Field(default=256, ge=1)
    attention: Literal["auto", "triton", "sdpa", "flash", "eager", "reference"] = "auto"


@dataclass(**_OPTIONS)
class MaskConfig:
    """Which patches are masked; ratio and generator are inferred (spec/miles.md 3)."""

    kind: Literal["tube_block", "tube_random", "frame_random"] = "tube_block"
    ratio: float = Field(default=0.5, gt=0, lt=1)

    def masked_per_frame(self, grid: int) -> int:
        """Masked positions of one frame: round(ratio * grid^2), at least one masked and one visible."""
        return min(max(round(self.ratio * grid * grid), 1), grid * grid - 1)


@dataclass(**_OPTIONS)
class RegressionConfig:
    """Masked feature regression (spec/miles.md 2.2; all defaults inferred)."""

    feature: Literal["final_norm", "projected"] = "final_norm"
    normalization: Literal["l2", "layernorm", "none"] = "l2"
    head: Literal["none", "linear", "mlp"] = "none"
    weight: float = Field(default=1.0, ge=0)


@dataclass(**_OPTIONS)
class SnapshotConfig:
    """How the snapshot follows the student (spec/miles.md 1.5; all defaults inferred).

    `ema`: momentum rises from `momentum` to `final_momentum` along a cosine; `copy`: every `every` steps;
    `frozen`.
    """

    update: Literal["ema", "copy", "frozen"] = "ema"
    momentum: float = Field(default=0.996, ge=0, le=1)
    final_momentum: float = Field(default=1.0, ge=0, le=1)
    every: int = Field(default=1, ge=1)


@dataclass(**_OPTIONS)
class ContrastConfig:
    """Video-text contrast (spec/miles.md 2.1, 2.4).

    `grad_scale` multiplies its gradient; `official` is 1 / ranks, which the official trainer applies
    unawares. `clip` is what view D contrasts: the visible patches, or the full clip in a pass of its own (A
    and B are defined by theirs).
    """

    temperature: float = Field(default=0.05, gt=0)
    grad_scale: Annotated[float, Field(gt=0)] | Literal["official"] = 1.0
    clip: Literal["visible", "full"] = "visible"

    @field_validator("grad_scale", mode="wrap")
    @classmethod
    def _either(cls, value: Any, parse: Callable[[Any], Any]) -> Any:
        try:
            return parse(value)
        except ValidationError:
            raise ValueError("must be a finite number greater than 0, or official") from None


@dataclass(**_OPTIONS)
class PredictorConfig:
    """View D's predictor of masked features; all sizes inferred."""

    width: int = Field(default=384, ge=1)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=6, ge=1)

    def __post_init__(self) -> None:
        _check_heads(self.width, self.heads)


@dataclass(**_OPTIONS)
class MethodConfig:
    """Which passes are made.

    View A: the masked pass feeds both losses (the paper's figure). B: masked for regression, full for
    contrast. D: the masked patches are dropped, a light predictor supplies them (spec/miles.md 8.3; not the
    paper's). none: contrast on the full clip only, the paper's own baseline.
    """

    view: Literal["A", "B", "D", "none"] = "A"
    mask: MaskConfig = Field(default_factory=MaskConfig)
    regression: RegressionConfig = Field(default_factory=RegressionConfig)
    snapshot: SnapshotConfig = Field(default_factory=SnapshotConfig)
    contrast: ContrastConfig = Field(default_factory=ContrastConfig)
    predictor: PredictorConfig = Field(default_factory=PredictorConfig)

    def __post_init__(self) -> None:
        if self.view == "D" and not self.mask.kind.startswith("tube"):
            raise ValueError(
                "view D drops patches, which needs the same ones in every frame: "
                f"mask.kind = {self.mask.kind} must be tube_block or tube_random"
            )


@dataclass(**_OPTIONS)
class RunConfig:
    """The run itself. `steps` are optimizer steps; `init_from` is an exported folder or another run.

    The newest `keep_checkpoints` are kept, and those of every `milestone_every`-th step (0: none) for good.
    A checkpoint that cannot be written ends the run, or with `on_save_error: continue` is tried again when
    the next one is due.

    A step whose loss or gradient is not finite is skipped, and with `spike_factor` one whose loss exceeds so
    many times the running median; after `max_skipped_steps` in a row the run goes back to its last checkpoint
    and leaves their data out, `max_rollbacks` times between two checkpoints. `min_target_std` is the
    standard deviation of the targets below which the log warns of collapse. When no rank gets on for
    `hang_seconds` (0: for ever; evaluating must fit, the start and the first step may take five times as
    long), the run ends and names the rank.

    `freeze`: prefixes of published weight names (video_model.blocks.0., say) that are not trained; ZeRO-3
    takes none. `lr_scale`: factors of the learning rate by such prefixes, of which the longest counts. With a
    `patience` the best model by the R-sum on the first evaluation set, the one that the run starts from
    included, is kept in RUN/best, and the run ends after so many evaluations without a better one; 0 trains
    all steps.

    `compile` has torch.compile fuse what lies between matrix products; `cuda_graphs` has a GPU launch the
    passes of a step as a whole (ZeRO 0 to 2). `activation_memory_budget`, with `compile`, is the share of
    what the video encoder's backward needs that is kept; the rest, cheapest first, is computed again.

    `precision: fp8` (with DeepSpeed's bf16 on a GPU; H100 or later) rounds what the video blocks' qkv and MLP
    layers multiply, in the student's and the snapshot's forward passes; backward, weights and files stay as
    they are. Unset, all is as DeepSpeed's json says.
    """

    folder: str
    steps: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int = Field(default=0, ge=0)
    patience: int = Field(default=0, ge=0)
    save_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    milestone_every: int = Field(default=0, ge=0)
    on_save_error: Literal["stop", "continue"] = "stop"
    max_skipped_steps: int = Field(default=10, ge=1)
    max_rollbacks: int = Field(default=3, ge=0)
    spike_factor: float | None = Field(default=None, gt=1)
    min_target_std: float = Field(default=0.01, ge=0)
    hang_seconds: float = Field(default=1800.0, ge=0)
    init_from: str | None = None
    freeze: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    compile: bool = False
    cuda_graphs: bool = False
    precision: Literal["fp8"] | None = None
    activation_memory_budget: float = Field(default=1.0, ge=0, le=1)


@dataclass(**_OPTIONS)
class Config:
    """A whole experiment."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    method: MethodConfig = Field(default_factory=MethodConfig)

    def __post_init__(self) -> None:
        if self.run.patience and not (self.run.evaluate_every and self.data.evaluation):
            raise ValueError(
                f"run.patience = {self.run.patience} needs run.evaluate_every and a set in data.evaluation"
            )
        if self.run.activation_memory_budget < 1 and not self.run.compile:
            raise ValueError(
                f"run.activation_memory_budget = {self.run.activation_memory_budget} needs run.compile: true"
            )
        if self.run.precision == "fp8":
            self._require_multiples_of_16()
        if self.data.caption_tokens > self.model.text.max_positions:
            raise ValueError(
                f"data.caption_tokens {self.data.caption_tokens} exceeds model.text.max_positions "
                f"{self.model.text.max_positions}"
            )

    def _require_multiples_of_16(self) -> None:
        video = self.model.video
        sizes = {
            "model.video.width": video.width,
            "model.video.width * mlp_ratio": int(video.width * video.mlp_ratio),
        }
        if self.method.view == "D":
            sizes["method.predictor.width"] = self.method.predictor.width
        for key, size in sizes.items():
            if size % 16:
                raise ValueError(
                    f"{key} = {size}: run.precision = fp8 takes multiples of 16; change it, or take "
                    "run.precision out"
                )
