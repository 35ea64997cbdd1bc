"""A trained model for use: videos and captions in, embeddings out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from miles_fast.data.augmentation import PillowAugmentation
from miles_fast.data.video_files import VideoFile, read_video_file
from miles_fast.models.caption_tokens import CaptionEncoder, caption_length
from miles_fast.models.dual_encoder import DualEncoder, unit

Videos = Tensor | Sequence[str | Path]


class VideoTextEncoder(DualEncoder):
    """The dual encoder with what a user calls. Videos are paths, or normalised pixels (B, T, 3, H, W).

    Embeddings are float32 of length 1, so that a product of two is their cosine. The dtype of the weights is
    that of the computation: `.bfloat16()` for speed on a GPU.
    """

    @torch.inference_mode()
    def encode_video(self, videos: Videos, num_frames: int | None = None, batch: int = 16) -> Tensor:
        """Clips in the shared space, (B, E); `num_frames` are taken of each file (default: the model's own).

        Raises ValueError naming the file that cannot be decoded, and why, and for numbers below 1.
        """
        parts = [unit(self.embed_video(video)) for video in self._batches(videos, num_frames, batch)]
        return torch.cat(parts)

    @torch.inference_mode()
    def encode_patches(self, videos: Videos, num_frames: int | None = None, batch: int = 16) -> Tensor:
        """Every patch in the shared space, (B, T, rows, columns, E): comparable with words and captions."""
        parts = [
            unit(self.vid_proj(self.video_model(video)[:, 1:])).unflatten(
                1, (video.shape[1], self.config.video.grid, self.config.video.grid)
            )
            for video in self._batches(videos, num_frames, batch)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def encode_words(self, caption: str) -> tuple[list[str], Tensor]:
        """The words of a caption and their embeddings in the shared space, (W, E): its tokens' mean.

        The projection is the caption's, which training applies to [CLS] alone (as the paper's figure does).
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: load it with miles_fast.load(folder)")
        encoded = self.tokenizer(
            caption, truncation=True, max_length=self.config.text.max_positions, return_offsets_mapping=True
        )
        device = self.vid_proj[0].weight.device
        ids = torch.tensor([encoded["input_ids"]], device=device)
        hidden_LD = self.text_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        tokens_LE = self.text_proj(hidden_LD)
        places: dict[int, list[int]] = {}
        for place, word in enumerate(encoded.word_ids()):
            if word is not None:
                places.setdefault(word, []).append(place)
        offsets = encoded["offset_mapping"]
        words = [caption[offsets[found[0]][0] : offsets[found[-1]][1]] for found in places.values()]
        means = [tokens_LE[found].mean(0) for found in places.values()]
        return words, unit(torch.stack(means)) if means else tokens_LE.new_zeros(0, tokens_LE.shape[1])

    @torch.inference_mode()
    def encode_text(self, captions: Sequence[str], length: int | None = None, batch: int = 256) -> Tensor:
        """Captions in the shared space, (B, E), cut at `length` tokens (default: 32, or the model's most).

        Raises ValueError for a `length` without room for a word beside [CLS] and [SEP], or above that most,
        and for a `batch` below 1.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: load it with miles_fast.load(folder)")
        if isinstance(captions, str) or not captions:
            raise ValueError("encode_text takes a list of captions with at least one in it")
        _check_at_least_one("batch", batch)
        encode = CaptionEncoder(self.tokenizer, caption_length(length, self.config.text.max_positions))
        device, parts = self.vid_proj[0].weight.device, []
        for start in range(0, len(captions), batch):
            tokens_B2L = torch.from_numpy(encode(captions[start : start + batch])).to(device)
            parts.append(unit(self.embed_text(*tokens_B2L.unbind(1))))
        return torch.cat(parts)

    def read_videos(self, paths: Sequence[str | Path], num_frames: int | None = None) -> Tensor:
        """Files as evaluation sees them: the middle frame of equal segments, the centre square, normalised.

        (B, T, 3, H, W) on the CPU. Raises ValueError as `encode_video` does.
        """
        num_frames = self._frames_of_a_clip(num_frames)
        augmentation = PillowAugmentation(num_frames, self.config.video.image_size, torch.device("cpu"))
        clips, views = [], []
        for path in paths:
            if not Path(path).is_file():
                raise ValueError(f"{path}: no such file")
            clip = read_video_file(VideoFile(key=str(path), path=str(path)), num_frames)
            clips.append(clip.frames)
            views.append(clip.view)
        augmentation.submit(clips, views)
        return augmentation.collect()

    def _frames_of_a_clip(self, num_frames: int | None) -> int:
        if num_frames is None:
            return self.config.video.num_frames
        _check_at_least_one("num_frames", num_frames)
        return num_frames

    def _batches(self, videos: Videos, num_frames: int | None, batch: int):
        num_frames = self._frames_of_a_clip(num_frames)
        _check_at_least_one("batch", batch)
        device, size = self.vid_proj[0].weight.device, self.config.video.image_size
        if isinstance(videos, str | Path) or not len(videos):
            raise ValueError("videos are a tensor (B, T, 3, H, W) or a list of paths, at least one")
        if isinstance(videos, Tensor):
            if videos.ndim != 5 or tuple(videos.shape[2:]) != (3, size, size):
                raise ValueError(
                    f"video is {tuple(videos.shape)}, expected (B, T, 3, {size}, {size}), normalised as "
                    "miles_fast.data.augmentation does"
                )
            if not videos.is_floating_point():
                raise ValueError(
                    f"video is {videos.dtype}: normalise it (x / 255 - mean) / std, or give paths"
                )
        for start in range(0, len(videos), batch):
            part = videos[start : start + batch]
            yield (part if isinstance(part, Tensor) else self.read_videos(part, num_frames)).to(device)


def _check_at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{key} {value}: must be at least 1; leave it out for the default")
