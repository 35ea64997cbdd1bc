"""Fine-tuning learns: real weights, real clips, minutes of a CPU; only with MILES_FAST_REAL_FINETUNING.

MILES_FAST_WEIGHTS names the folder of tests/models/test_real_weights.py. Of the captioned clips beside the
checkout 100 are trained on and the others are the gallery, for several splits; their ranks are pooled.

    MILES_FAST_REAL_FINETUNING=4 MILES_FAST_WEIGHTS=DIR pytest -s tests/evaluation/test_real_finetuning.py
"""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ds_tree

from miles_fast.config import DataConfig, SourceConfig, parse_config
from miles_fast.data.loader import EvaluationLoader
from miles_fast.data.preparation import PreparationOptions, prepare
from miles_fast.evaluation.retrieval import embed_source
from miles_fast.export.run import load
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training.engine import check_ds_config
from miles_fast.training.loop import pretrain

WEIGHTS = Path(os.environ.get("MILES_FAST_WEIGHTS", "nowhere"))
SPLITS = int(os.environ.get("MILES_FAST_REAL_FINETUNING", "0"))
SIZE, DEPTH, TRAINED, STEPS, BATCH = 84, 10, 100, 24, 50
pytestmark = [
    pytest.mark.skipif(not SPLITS, reason="MILES_FAST_REAL_FINETUNING: not asked for"),
    pytest.mark.skipif(
        not (WEIGHTS / "text").is_dir(), reason="MILES_FAST_WEIGHTS: real weights are not here"
    ),
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def clips(shared, tmp_path_factory):
    """Frames of every captioned clip, by key: members of its sample."""
    place = tmp_path_factory.mktemp("clips")
    listed = json.loads((shared / "clips" / "manifest.json").read_text())
    captions = {c["file"]: c["caption"] for c in listed if c.get("caption") and not c["decode_error"]}
    (place / "captions.json").write_text(json.dumps(captions))
    options = PreparationOptions(frames=8, short_side=128, workers=2)
    prepare([str(shared / "clips")], str(place / "frames"), str(place / "captions.json"), options=options)
    samples: dict[str, dict[str, bytes]] = {}
    for tar in sorted((place / "frames").glob("*.tar")):
        with tarfile.open(tar) as file:
            for member in file:
                key, extension = member.name.split(".", 1)
                samples.setdefault(key, {})[extension] = file.extractfile(member).read()
    return samples


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The ViT-S/14 without its last block, which its README calls damaged."""
    weights = load_file(WEIGHTS / "vit" / "vit_s14_timm.safetensors")
    place = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(
        {name: t for name, t in weights.items() if not name.startswith(("blocks.10.", "blocks.11."))}, place
    )
    return place


def write_shard(path, samples, captions=None):
    import io

    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for number, (key, members) in enumerate(samples.items()):
            for extension, data in members.items():
                if captions is not None and extension == "txt":
                    data = captions[number].encode()
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def split(clips, seed):
    keys = np.random.default_rng(seed).permutation(sorted(clips)).tolist()
    return {k: clips[k] for k in keys[:TRAINED]}, {k: clips[k] for k in keys[TRAINED:]}


def finetune(root, clips, vit, seed, shuffled=False):
    """Similarity (text, video) of the gallery after fine-tuning on the others."""
    trained, held_out = split(clips, seed)
    captions = [members["txt"].decode() for members in trained.values()]
    wrong = np.roll(captions, 37).tolist() if shuffled else None
    shutil.rmtree(root, ignore_errors=True)
    write_shard(root / "train.tar", trained, wrong)
    write_shard(root / "heldout.tar", held_out)
    heldout = {"shards": [str(root / "heldout.tar")], "name": "heldout"}
    data = {
        "train": [{"shards": [str(root / "train.tar")]}],
        "frames_per_clip": 2,
        "caption_tokens": 24,
        "threads": 2,
        "decode_workers": 1,
    }
    tree = {
        "run": {"folder": str(root / "run"), "steps": STEPS, "seed": seed, "save_every": STEPS},
        "data": data,
        "model": {
            "video": {
                "image_size": SIZE,
                "patch_size": 14,
                "width": 384,
                "depth": DEPTH,
                "heads": 6,
                "num_frames": 2,
                "weights": str(vit),
            },
            "text": {"weights": str(WEIGHTS / "text")},
            "attention": "sdpa",  # the tests interpret Triton, which takes minutes here
        },
        "method": {"view": "none"},
    }
    config = parse_config(tree, "real")
    settings = ds_tree(batch=BATCH)
    settings["optimizer"]["params"] |= {"lr": 1e-4, "weight_decay": 0.05}
    schedule = {"total_num_steps": "auto", "warmup_num_steps": 6, "warmup_type": "linear"}
    settings["scheduler"] = {"type": "WarmupCosineLR", "params": schedule}
    pretrain(config, check_ds_config(settings, "ds.json", config, cuda=False, ranks=1))
    loader = EvaluationLoader(
        SourceConfig(**heldout),
        DataConfig(**{**data, "frames_per_clip": 2}),
        image_size=SIZE,
        tokenizer=load_tokenizer(WEIGHTS / "text"),
        batch=19,
        device=torch.device("cpu"),
    )
    model = load(root / "run")
    texts, videos, keys, _ = embed_source(model, loader)
    assert len(keys) == len(held_out)
    return texts @ videos.T
