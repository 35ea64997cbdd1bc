"""MILES for Hugging Face's transformers: MilesModel, MilesConfig, MilesProcessor.

import miles_fast.export.hugging_face  # registers them; before transformers, which torchvision may stop
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_fast.config_tree import parse_model, to_dict
from miles_fast.data.augmentation import PillowAugmentation
from miles_fast.data.sampling import evaluation_view, segment_frames
from miles_fast.export.model_card import model_card
from miles_fast.export.pretrained import Pretrained
from miles_fast.files import whole_folder
from miles_fast.models.caption_tokens import caption_length
from miles_fast.models.dual_encoder import DualEncoder, unit
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.models.torchvision_cpu import repair_torchvision

repair_torchvision()

from transformers import (  # noqa: E402
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoProcessor,
    BatchFeature,
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import ModelOutput  # noqa: E402


class MilesConfig(PreTrainedConfig):
    """The model section of a run's config: `video`, `text`, `embedding`, `attention`."""

    model_type = "miles"

    def __init__(
        self,
        video: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        embedding: int = 256,
        attention: str = "auto",
        vocabulary_size: int = 30522,
        **more: Any,
    ) -> None:
        self.video, self.text = video or {}, text or {"tokenizer": "."}
        self.embedding, self.attention, self.vocabulary_size = embedding, attention, vocabulary_size
        super().__init__(**more)


@dataclass
class MilesOutput(ModelOutput):
    """Unit embeddings of clips and captions (B, E), their cosines (captions, clips), the clips' tokens."""

    video_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_text: Tensor | None = None
    video_hidden_state: Tensor | None = None


class MilesModel(PreTrainedModel):
    """The dual encoder under its published key names."""

    config_class = MilesConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MilesConfig) -> None:
        super().__init__(config)
        tree = {"video": config.video, "text": config.text, "embedding": config.embedding}
        tree["attention"] = config.attention
        model = DualEncoder(parse_model(tree, "MilesConfig"), config.vocabulary_size)
        self.text_model, self.text_proj = model.text_model, model.text_proj
        self.video_model, self.vid_proj = model.video_model, model.vid_proj
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The towers initialise themselves when they are built."""

    def get_video_features(self, pixel_values: Tensor) -> Tensor:
        """Clips (B, T, 3, H, W) -> unit embeddings (B, E)."""
        return unit(self.vid_proj(self.video_model(pixel_values)[:, 0]))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Captions (B, L) -> unit embeddings (B, E)."""
        hidden = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return unit(self.text_proj(hidden[:, 0]))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> MilesOutput:
        """Whatever the inputs allow: clips, captions, or both and their cosines."""
        videos = texts = tokens = None
        if pixel_values is not None:
            tokens = self.video_model(pixel_values)
            videos = unit(self.vid_proj(tokens[:, 0]))
        if input_ids is not None:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            texts = self.get_text_features(input_ids, attention_mask)
        both = videos is not None and texts is not None
        return MilesOutput(
            video_embeds=videos,
            text_embeds=texts,
            logits_per_text=texts @ videos.T if both else None,
            video_hidden_state=tokens,
        )


class MilesFeatureExtractor(FeatureExtractionMixin):
    """Frames to pixels as evaluation does: equal segments' middle frames, centre square, normalised."""

    model_input_names = ["pixel_values"]

    def __init__(self, num_frames: int = 4, image_size: int = 224, **more: Any) -> None:
        super().__init__(**more)
        self.num_frames, self.image_size = num_frames, image_size

    def __call__(self, videos: Sequence[Sequence[np.ndarray]]) -> Tensor:
        """Clips of any number of (H, W, 3) uint8 RGB frames, in order -> (B, T, 3, H, W) float32."""
        augmentation = PillowAugmentation(self.num_frames, self.image_size, torch.device("cpu"))
        clips, views = [], []
        for number, frames in enumerate(videos):
            frames = [np.asarray(frame) for frame in frames]
            if not frames or any(f.ndim != 3 or f.shape[2] != 3 or f.dtype != np.uint8 for f in frames):
                raise ValueError(f"videos[{number}]: expected a list of (height, width, 3) uint8 RGB frames")
            chosen = segment_frames(len(frames), self.num_frames)
            clips.append([frames[place] for place in chosen])
            views.append(evaluation_view(*frames[0].shape[:2]))
        augmentation.submit(clips, views)
        return augmentation.collect()


class MilesProcessor(ProcessorMixin):
    """Clips by the feature extractor, captions by the tokenizer, padded to the longest."""

    def __init__(self, feature_extractor: MilesFeatureExtractor, tokenizer: Any) -> None:
        super().__init__(feature_extractor, tokenizer)

    def __call__(
        self,
        videos: Sequence[Sequence[np.ndarray]] | None = None,
        text: str | Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> BatchFeature:
        """`pixel_values` of videos, `input_ids` and `attention_mask` of text, as torch tensors.

        Text is cut at `max_length` tokens (default: 32, or the model's most). Raises ValueError for a
        `max_length` without room for a word beside [CLS] and [SEP], or above that most.
        """
        if videos is None and text is None:
            raise ValueError("MilesProcessor takes videos, text, or both")
        data: dict[str, Tensor] = {}
        if videos is not None:
            data["pixel_values"] = self.feature_extractor(videos)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            length = caption_length(max_length, self.tokenizer.model_max_length, key="max_length")
            encoded = self.tokenizer(
                texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            data |= {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(data)


AutoConfig.register("miles", MilesConfig)
AutoModel.register(MilesConfig, MilesModel)
AutoFeatureExtractor.register(MilesConfig, MilesFeatureExtractor)
AutoProcessor.register(MilesConfig, MilesProcessor)


def write_hugging_face(found: Pretrained, folder: Path) -> None:
    """Write model, processor and model card (README.md) as one folder, whole or not at all."""
    tree = to_dict(found.config)
    tree["text"] |= {"tokenizer": ".", "weights": None}
    tree["video"]["weights"] = None
    model = MilesModel(MilesConfig(**tree, vocabulary_size=found.vocabulary_size))
    model.load_state_dict(found.weights)
    video = found.config.video
    extractor = MilesFeatureExtractor(num_frames=video.num_frames, image_size=video.image_size)
    with whole_folder(folder, spare_others=True) as partial:
        model.save_pretrained(partial)
        tokenizer = load_tokenizer(found.tokenizer)
        tokenizer.model_max_length = found.config.text.max_positions  # the processor knows it from here only
        MilesProcessor(extractor, tokenizer).save_pretrained(partial)
        (partial / "README.md").write_text(model_card(found))
