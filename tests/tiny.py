"""The smallest run there is: frame shards of flat coloured images, a vocabulary, and a config."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from miles_fast.config import Config
from miles_fast.config_tree import parse_config
from miles_fast.data.vocabulary import build_vocabulary

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
NOUNS = ("dog", "cat", "tree", "car", "boat")


def jpeg(seed: int, height: int = 40, width: int = 56) -> bytes:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def caption(number: int) -> str:
    """One of thirty captions."""
    return f"a {COLOURS[number % 6]} {NOUNS[number // 6 % 5]} moves"


def write_frames(
    folder: Path, count: int, *, shards: int = 2, frames: int = 4, checksums: bool = True
) -> list[Path]:
    """Frame shards of `count` samples; sample i has key f'{i:04d}'."""
    import webdataset  # imports torch, which reading processes that draw masks from here need not

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        path = folder / f"{shard:05d}.tar"
        paths.append(path)
        with webdataset.TarWriter(str(path), encoder=False, mtime=0.0) as writer:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                images = [jpeg(100 * i + t) for t in range(frames)]
                record = {"width": 56, "height": 40, "crc32": [zlib.crc32(image) for image in images]}
                sample = {f"{t:02d}.jpg": image for t, image in enumerate(images)}
                sample |= {"__key__": f"{i:04d}", "txt": caption(i).encode()}
                if checksums:
                    sample["json"] = json.dumps(record).encode()
                writer.write(sample)
    return paths


def tiny_tree(root: Path) -> dict:
    """A config tree over shards that `write_data` made under `root`."""
    return {
        "run": {"folder": str(root / "run"), "steps": 6, "log_every": 1, "save_every": 3},
        "data": {
            "train": [{"shards": [str(root / "train" / "*.tar")]}],
            "evaluation": [{"shards": [str(root / "heldout" / "*.tar")], "name": "heldout"}],
            "frames_per_clip": 2,
            "caption_tokens": 8,
            "threads": 1,
            "decode_workers": 2,
        },
        "model": {
            "video": {
                "image_size": 32,
                "patch_size": 8,
                "width": 24,
                "depth": 2,
                "heads": 2,
                "num_frames": 2,
            },
            "text": {
                "tokenizer": str(root / "tokenizer"),
                "width": 16,
                "depth": 1,
                "heads": 2,
                "hidden": 32,
                "max_positions": 16,
            },
            "embedding": 16,
        },
    }


def write_data(root: Path, count: int = 24) -> None:
    """train/, heldout/ and tokenizer/ under `root`."""
    write_frames(root / "train", count)
    write_frames(root / "heldout", 10, shards=1)
    build_vocabulary((caption(i) for i in range(30)), root / "tokenizer")


def tiny_config(root: Path, **sections: dict) -> Config:
    """The tiny config with keys of sections replaced: run={...}, method={...}."""
    tree = tiny_tree(root)
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree, "tiny")


def joined_masks(config: Config, batch: int, rank: int, ranks: int, micro_step: int) -> np.ndarray:
    """A rank's part of the masks that one rank would draw for the joined batch."""
    from miles_fast.training.masks import draw_step_masks

    joined = draw_step_masks(config, batch * ranks, 0, micro_step)
    return joined[rank * batch : (rank + 1) * batch]


def numbered_masks(batch: int, micro_step: int) -> np.ndarray:
    """Masks that name their step."""
    return np.full((batch, 1), micro_step)


# As in launch/ds, of bf16 at ZeRO 1: another of DeepSpeed's optimizers.
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
# Of zero_optimization: ZeRO 3 deals out the smallest weight, and lets go of it behind its layer.
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


def ds_tree(stage: int = 0, batch: int = 4, accumulation: int = 1, bf16: bool = False) -> dict:
    """DeepSpeed's json for the tiny runs."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
    }
