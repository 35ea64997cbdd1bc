"""Fine-tuning learns: real weights, real clips, minutes of a CPU; only with MILES_FAST_REAL_FINETUNING.

MILES_FAST_WEIGHTS names the folder of tests/models/test_real_weights.py. Of the captioned clips beside the
checkout 100 are trained on and the others are the gallery, for several splits; their ranks are pooled.

    MILES_FAST_REAL_FINETUNING=4 MILES_FAST_WEIGHTS=DIR pytest -s --timeout 3600 \
        tests/evaluation/test_real_finetuning.py
"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ds_tree

from miles_fast.config import DataConfig, SourceConfig, TextEncoderConfig, parse_config
from miles_fast.data.loader import EvaluationLoader
from miles_fast.data.preparation import PreparationOptions, prepare
from miles_fast.evaluation.retrieval import chance, embed_source, ranking
from miles_fast.export.run import load
from miles_fast.models.caption_tokens import CaptionEncoder
from miles_fast.models.dual_encoder import unit
from miles_fast.models.text_encoder import build_text_encoder, load_tokenizer
from miles_fast.training.engine import check_ds_config
from miles_fast.training.loop import pretrain

WEIGHTS = Path(os.environ.get("MILES_FAST_WEIGHTS", "nowhere"))
SPLITS = int(os.environ.get("MILES_FAST_REAL_FINETUNING", "0"))
SIZE, DEPTH, TRAINED, STEPS, BATCH, LR = 98, 10, 100, 24, 50, 4e-4
FROZEN = [
    *("video_model.cls_token", "video_model.pos_embed", "video_model.patch_embed.", "text_model.embeddings."),
    *(f"video_model.blocks.{block}." for block in range(8)),
    *(f"text_model.transformer.layer.{layer}." for layer in range(3)),
]
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for number, (key, members) in enumerate(samples.items()):
            for extension, data in members.items():
                if captions is not None and extension == "txt":
                    data = captions[number].encode()
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def gallery_split(clips, seed):
    keys = np.random.default_rng(seed).permutation(sorted(clips)).tolist()
    return {k: clips[k] for k in keys[:TRAINED]}, {k: clips[k] for k in keys[TRAINED:]}


def finetune(root, clips, vit, seed, shuffled=False):
    """Similarity (text, video) of the gallery after fine-tuning on the others."""
    trained, held_out = gallery_split(clips, seed)
    captions = [members["txt"].decode() for members in trained.values()]
    wrong = np.roll(captions, 37).tolist() if shuffled else None
    shutil.rmtree(root, ignore_errors=True)
    write_shard(root / "train.tar", trained, wrong)
    write_shard(root / "heldout.tar", held_out)
    heldout = {"shards": [str(root / "heldout.tar")], "name": "heldout"}
    data = {
        "train": [{"shards": [str(root / "train.tar")]}],
        "frames_per_clip": 1,  # as the first stage of the published curriculum
        "caption_tokens": 20,
        "threads": 2,
        "decode_workers": 1,
    }
    tree = {
        "run": {
            "folder": str(root / "run"),
            "steps": STEPS,
            "seed": seed,
            "save_every": STEPS,
            "freeze": FROZEN,
        },
        "data": data,
        "model": {
            "video": {
                "image_size": SIZE,
                "patch_size": 14,
                "width": 384,
                "depth": DEPTH,
                "heads": 6,
                "num_frames": 4,
                "weights": str(vit),
            },
            "text": {"weights": str(WEIGHTS / "text")},
            "attention": "sdpa",  # the tests interpret Triton, which takes minutes here
        },
        "method": {"view": "none"},
    }
    config = parse_config(tree, "real")
    settings = ds_tree(batch=BATCH)
    settings["optimizer"]["params"] |= {"lr": LR, "weight_decay": 0.05}
    schedule = {"total_num_steps": "auto", "warmup_num_steps": 6, "warmup_type": "linear"}
    settings["scheduler"] = {"type": "WarmupCosineLR", "params": schedule}
    pretrain(config, check_ds_config(settings, "ds.json", config, cuda=False, ranks=1))
    loader = EvaluationLoader(
        SourceConfig(**heldout),
        DataConfig(**{**data, "frames_per_clip": 4}),
        image_size=SIZE,
        tokenizer=load_tokenizer(WEIGHTS / "text"),
        batch=19,
        device=torch.device("cpu"),
    )
    model = load(root / "run")
    texts, videos, keys, _ = embed_source(model, loader)
    assert len(keys) == len(held_out)
    return texts @ videos.T


def sentence_vectors(captions):
    """Mean token features of the text encoder as it came, (N, D), unit length."""
    model = build_text_encoder(TextEncoderConfig(weights=str(WEIGHTS / "text")), 0).eval()
    encode = CaptionEncoder(load_tokenizer(WEIGHTS / "text"), 32)
    ids, attention = torch.from_numpy(encode(captions)).unbind(1)
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=attention).last_hidden_state
    return unit((hidden * attention[..., None]).sum(1))


def pixel_similarity(clips, seed):
    """Ridge regression from 8 x 8 pixels of three frames to sentence vectors, with the best penalty."""
    parts = gallery_split(clips, seed)
    pixels, vectors = [], []
    for part in parts:
        frames = [[m[f"{t:02d}.jpg"] for t in (1, 3, 6) if f"{t:02d}.jpg" in m] for m in part.values()]
        frames = [(chosen or [m["00.jpg"]]) for chosen, m in zip(frames, part.values(), strict=True)]
        small = [
            np.concatenate(
                [
                    np.asarray(Image.open(io.BytesIO(f)).convert("RGB").resize((8, 8))).ravel()
                    for f in (c * 3)[:3]
                ]
            )
            for c in frames
        ]
        pixels.append(torch.tensor(np.stack(small), dtype=torch.float64))
        vectors.append(sentence_vectors([m["txt"].decode() for m in part.values()]).double())
    mean, deviation, centre = pixels[0].mean(0), pixels[0].std(0), vectors[0].mean(0)
    train, test = ((p - mean) / deviation for p in pixels)
    kernel, goal = train @ train.T, vectors[0] - centre
    found = []
    for penalty in 10.0 ** torch.arange(1, 7):
        weights = torch.linalg.solve(kernel + penalty * torch.eye(len(train)), goal)
        found.append(unit(vectors[1] - centre) @ unit(test @ train.T @ weights).double().T)
    return max(found, key=lambda similarity: ranking(similarity).r5)


def galleries_of_32(similarity):
    """Mean R@5 of random galleries of 32, the size of the reference figure."""
    random = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(len(similarity), generator=random)[:32] for _ in range(200)]
    return float(np.mean([ranking(similarity[c][:, c]).r5 for c in chosen]))


def test_finetuning_beats_frozen_features_and_shuffled_captions_fall_to_chance(clips, vit, tmp_path):
    # Frozen features of the same weights reach R@5 .70 in galleries of 32 (../shared/weights/README.md).
    gallery = len(clips) - TRAINED
    guess = chance(gallery).r5
    bar = 0.70 * guess / chance(32).r5
    tuned = [finetune(tmp_path / "run", clips, vit, seed) for seed in range(SPLITS)]
    pixels = [pixel_similarity(clips, seed) for seed in range(SPLITS)]
    wrong = [finetune(tmp_path / "run", clips, vit, seed, shuffled=True) for seed in range(SPLITS)]

    def pooled(similarities):
        forth, back = ([ranking(s) for s in part] for part in (similarities, [s.T for s in similarities]))
        return {k: np.mean([getattr(r, k) for r in forth + back]) for k in ("r1", "r5", "r10")}

    rows = {
        "fine-tuned": (pooled(tuned), np.mean([galleries_of_32(s) for s in tuned])),
        "8 x 8 pixels": (pooled(pixels), np.mean([galleries_of_32(s) for s in pixels])),
        "shuffled captions": (pooled(wrong), np.mean([galleries_of_32(s) for s in wrong])),
        "chance": (chance(gallery).__dict__, chance(32).r5),
    }
    print(f"\n{SPLITS} splits of {TRAINED} + {gallery} clips, both directions pooled; bar R@5 {bar:.3f}")
    for name, (row, small) in rows.items():
        figures = "  ".join(f"R@{k[1:]} {row[k]:.3f}" for k in ("r1", "r5", "r10"))
        print(f"{name:<18} {figures}  R@5 of 32 {small:.3f}")
    assert rows["fine-tuned"][0]["r5"] > bar
    assert rows["fine-tuned"][0]["r5"] > rows["8 x 8 pixels"][0]["r5"]
    # Three standard deviations of a guess in one gallery: alike clips share their fate, so splits add little.
    assert rows["shuffled captions"][0]["r5"] < guess + 3 * (guess * (1 - guess) / gallery) ** 0.5
