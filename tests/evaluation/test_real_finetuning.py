"""Fine-tuning learns: real weights, real clips, minutes of a CPU; only with MILES_FAST_REAL_FINETUNING.

MILES_FAST_WEIGHTS names the folder of tests/models/test_real_weights.py. Of the captioned clips beside the
checkout 100 are trained on and the others are the gallery, for several splits; their ranks are pooled. The
settings were chosen on the first six splits of DEVELOPMENT (in a loop over cached video features of a few
crops); those of REPORTED were first run when they stood. All splits are of the same clips: what was chosen
has seen clips of the galleries that are reported. What the frozen towers reach alone is printed beside the
result.

Projections start as ridge regressions onto the frozen text encoder's sentence vectors of the training clips;
the trainer goes on from there with the upper half of the text encoder, and with the projections at a
hundredth of its rate: a clip's features are 35 long, projected 1, and Adam, which moves every weight by the
rate at first, would undo the regression in three steps.

    MILES_FAST_REAL_FINETUNING=3 MILES_FAST_WEIGHTS=DIR pytest -s --timeout 3600 \
        tests/evaluation/test_real_finetuning.py      # MILES_FAST_REAL_SPLITS=development: the others
"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ds_tree

from miles_fast.config import DataConfig, SourceConfig
from miles_fast.config_tree import parse_config, parse_model, to_dict
from miles_fast.data.batches import Quarantine
from miles_fast.data.loader import EvaluationLoader
from miles_fast.data.preparation import PreparationOptions, prepare
from miles_fast.evaluation.retrieval import chance, embed_source, ranking
from miles_fast.export.run import load
from miles_fast.models.caption_tokens import CaptionEncoder
from miles_fast.models.dual_encoder import build_dual_encoder, unit
from miles_fast.models.storage import write_model
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.training.ds_config import check_ds_config
from miles_fast.training.loop import pretrain

WEIGHTS = Path(os.environ.get("MILES_FAST_WEIGHTS", "nowhere"))
SPLITS = int(os.environ.get("MILES_FAST_REAL_FINETUNING", "0"))
DEVELOPMENT, REPORTED = range(100, 120), range(2000, 2020)
SEEDS = DEVELOPMENT if os.environ.get("MILES_FAST_REAL_SPLITS") == "development" else REPORTED
SIZE, DEPTH, TOKENS, TRAINED = 154, 11, 20, 100
VIDEO_PENALTY, TEXT_PENALTY = 1000.0, 30.0  # of ridge regressions from features of variance 1
STEPS, BATCH, LR, TEMPERATURE = 20, 50, 1.5e-4, 0.2
LR_SCALE = {"vid_proj.": 0.01, "text_proj.": 0.01}
FROZEN = ["video_model.", "text_model.embeddings."]
FROZEN += [f"text_model.transformer.layer.{layer}." for layer in range(3)]
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
    options = PreparationOptions(frames=8, short_side=224, workers=2)
    prepare([shared / "clips"], place / "frames", options, captions=place / "captions.json")
    samples: dict[str, dict[str, bytes]] = {}
    for tar in sorted((place / "frames").glob("*.tar")):
        with tarfile.open(tar) as file:
            for member in file:
                key, extension = member.name.split(".", 1)
                samples.setdefault(key, {})[extension] = file.extractfile(member).read()
    return samples


@pytest.fixture(scope="module")
def towers(clips, tmp_path_factory):
    """The real towers with random projections, and what they make of every clip and caption, by key."""
    place = tmp_path_factory.mktemp("towers")
    weights = load_file(WEIGHTS / "vit" / "vit_s14_timm.safetensors")
    kept = {name: t for name, t in weights.items() if not name.startswith("blocks.11.")}  # it is damaged
    save_file(kept, place / "vit.safetensors")
    tree = {
        "video": {
            "image_size": SIZE,
            "patch_size": 14,
            "width": 384,
            "depth": DEPTH,
            "heads": 6,
            "num_frames": 4,
            "weights": str(place / "vit.safetensors"),
        },
        "text": {"weights": str(WEIGHTS / "text")},
        "embedding": 384,
        "attention": "sdpa",  # the tests interpret Triton, which takes minutes here
    }
    tokenizer = load_tokenizer(WEIGHTS / "text")
    model = build_dual_encoder(parse_model(tree, "real"), len(tokenizer)).eval()
    write_shard(place / "all.tar", clips)
    keys, videos = [], []
    with torch.inference_mode():
        for batch in loader_of(place / "all.tar").batches(Quarantine(None)):
            keys += batch.keys
            videos.append(model.video_features(batch.video_BTCHW))
        captions = [clips[key]["txt"].decode() for key in keys]
        ids, attention = torch.from_numpy(CaptionEncoder(tokenizer, TOKENS)(captions)).unbind(1)
        hidden = model.text_model(input_ids=ids, attention_mask=attention).last_hidden_state
    sentences = unit((hidden * attention[..., None]).sum(1))
    rows = zip(torch.cat(videos), hidden[:, 0].relu(), sentences, strict=True)
    return model, {key: Frozen(*row) for key, row in zip(keys, rows, strict=True)}


class Frozen(NamedTuple):
    """Video [CLS], what the text projection sees, and the caption's sentence vector, (384,) each."""

    video: torch.Tensor
    text: torch.Tensor
    sentence: torch.Tensor


def loader_of(shard):
    source = SourceConfig(shards=[str(shard)], name="clips")
    data = DataConfig(train=[source], frames_per_clip=4, caption_tokens=TOKENS, threads=2, decode_workers=1)
    return EvaluationLoader(
        source,
        data,
        image_size=SIZE,
        tokenizer=load_tokenizer(WEIGHTS / "text"),
        batch=19,
        device=torch.device("cpu"),
    )


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


def ridge(features, goals, penalty):
    """Weights and bias of the regression, scaled to predictions of length 1 in the mean."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x, y = ((features - mean) / deviation).double(), (goals - goals.mean(0)).double()
    weight = (x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(len(x)), y)).T / deviation
    weight /= ((features - mean).double() @ weight.T).norm(dim=1).mean()
    return {"weight": weight.float(), "bias": -(weight @ mean.double()).float()}


def finetune(root, clips, towers, seed, shuffled=False):
    """Similarities (text, video) of the gallery: at the start, and after fine-tuning on the others."""
    model, frozen = towers
    trained, held_out = gallery_split(clips, seed)
    shown = list(trained)
    said = np.roll(shown, 37).tolist() if shuffled else shown
    shutil.rmtree(root, ignore_errors=True)
    write_shard(root / "train.tar", trained, [clips[key]["txt"].decode() for key in said])
    write_shard(root / "heldout.tar", held_out)
    sentences = torch.stack([frozen[key].sentence for key in said])
    videos = torch.stack([frozen[key].video for key in shown])
    texts = torch.stack([frozen[key].text for key in said])
    model.vid_proj[0].load_state_dict(ridge(videos, sentences, VIDEO_PENALTY))
    model.text_proj[1].load_state_dict(ridge(texts, sentences, TEXT_PENALTY))
    write_model(
        root / "start", model.state_dict(), model.config, model.vocabulary_size, str(WEIGHTS / "text")
    )
    run = {
        "folder": str(root / "run"),
        "steps": STEPS,
        "seed": seed,
        "save_every": STEPS,
        "freeze": FROZEN,
        "lr_scale": LR_SCALE,
        "init_from": str(root / "start"),
    }
    data = {
        "train": [{"shards": [str(root / "train.tar")]}],
        "frames_per_clip": 1,  # as the first stage of the published curriculum
        "caption_tokens": TOKENS,
        "threads": 2,
        "decode_workers": 1,
    }
    method = {"view": "none", "contrast": {"temperature": TEMPERATURE}}
    tree = {"run": run, "data": data, "model": to_dict(model.config), "method": method}
    config = parse_config(tree, "real")
    settings = ds_tree(batch=BATCH)
    settings["optimizer"]["params"] |= {"lr": LR, "weight_decay": 0.05}
    schedule = {"total_num_steps": "auto", "warmup_num_steps": 5, "warmup_type": "linear"}
    settings["scheduler"] = {"type": "WarmupCosineLR", "params": schedule}
    pretrain(config, check_ds_config(settings, "ds.json", config, cuda=False, ranks=1))
    found = []
    for place in (root / "start", root / "run"):
        texts, videos, keys, _ = embed_source(load(place), loader_of(root / "heldout.tar"))
        assert len(keys) == len(held_out)
        found.append(texts @ videos.T)
    return found


def frozen_similarity(clips, frozen, seed):
    """The bar: ridge regression from the frozen video features to the sentence vectors themselves."""
    trained, held_out = gallery_split(clips, seed)
    videos, sentences = (torch.stack([frozen[key][column] for key in trained]) for column in (0, 2))
    projection = ridge(videos, sentences, VIDEO_PENALTY)
    shown = torch.stack([frozen[key].video for key in held_out]) @ projection["weight"].T + projection["bias"]
    said = torch.stack([frozen[key].sentence for key in held_out]) - sentences.mean(0)
    return unit(said) @ unit(shown).T


def pixel_similarity(clips, frozen, seed):
    """Ridge regression from 8 x 8 pixels of three frames to sentence vectors, with the best penalty."""
    trained, held_out = gallery_split(clips, seed)
    pixels = [
        torch.stack([small_pixels(members) for members in part.values()]) for part in (trained, held_out)
    ]
    goals, said = (torch.stack([frozen[key].sentence for key in part]) for part in (trained, held_out))
    said = unit(said - goals.mean(0))
    found = []
    for penalty in 10.0 ** torch.arange(1, 7):
        projection = ridge(pixels[0], goals, float(penalty))
        found.append(said @ unit(pixels[1] @ projection["weight"].T + projection["bias"]).T)
    return max(found, key=lambda similarity: ranking(similarity).r5)


def small_pixels(members):
    """Three frames of 8 x 8 pixels, (576,)."""
    frames = [members[f"{t:02d}.jpg"] for t in (1, 3, 6) if f"{t:02d}.jpg" in members] or [members["00.jpg"]]
    images = [Image.open(io.BytesIO(frame)).convert("RGB").resize((8, 8)) for frame in (frames * 3)[:3]]
    return torch.tensor(np.concatenate([np.asarray(image).ravel() for image in images]), dtype=torch.float32)


def galleries_of_32(similarity):
    """Mean R@5 of random galleries of 32, the size of the reference figure."""
    random = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(len(similarity), generator=random)[:32] for _ in range(200)]
    return float(np.mean([ranking(similarity[c][:, c]).r5 for c in chosen]))


def test_finetuning_beats_pixels_and_the_bar_and_shuffled_captions_fall_to_chance(clips, towers, tmp_path):
    # Frozen features of the same weights reach R@5 .70 in galleries of 32 (../shared/weights/README.md).
    gallery = len(clips) - TRAINED
    guess = chance(gallery).r5
    bar = 0.70 * guess / chance(32).r5
    seeds = SEEDS[:SPLITS]
    tuned = [finetune(tmp_path / "run", clips, towers, seed) for seed in seeds]
    wrong = [finetune(tmp_path / "run", clips, towers, seed, shuffled=True)[1] for seed in seeds]
    similarities = {
        "fine-tuned": [one[1] for one in tuned],
        "where it started": [one[0] for one in tuned],
        "frozen, ridge": [frozen_similarity(clips, towers[1], seed) for seed in seeds],
        "8 x 8 pixels": [pixel_similarity(clips, towers[1], seed) for seed in seeds],
        "shuffled captions": wrong,
    }
    rows = {}
    print(f"\nsplits {seeds}: {TRAINED} + {gallery} clips, both directions pooled; bar R@5 {bar:.3f}")
    for name, of_splits in similarities.items():
        ranks = [ranking(s) for one in of_splits for s in (one, one.T)]
        rows[name] = {k: float(np.mean([getattr(r, k) for r in ranks])) for k in ("r1", "r5", "r10")}
        spread = np.std([ranking(one).r5 / 2 + ranking(one.T).r5 / 2 for one in of_splits])
        small = np.mean([galleries_of_32(one) for one in of_splits])
        figures = "  ".join(f"R@{k[1:]} {v:.3f}" for k, v in rows[name].items())
        print(f"{name:<18} {figures}  R@5 of 32 {small:.3f}  R@5 between splits +-{spread:.3f}")
    at_random = chance(gallery)
    print(f"{'chance':<18} R@1 {at_random.r1:.3f}  R@5 {guess:.3f}  R@10 {at_random.r10:.3f}")
    assert rows["fine-tuned"]["r5"] > max(bar, rows["8 x 8 pixels"]["r5"])
    assert sum(rows["fine-tuned"].values()) >= sum(rows["where it started"].values())
    # Three standard deviations of a guess in one gallery: alike clips share their fate, so splits add little.
    assert rows["shuffled captions"]["r5"] < guess + 3 * (guess * (1 - guess) / gallery) ** 0.5
