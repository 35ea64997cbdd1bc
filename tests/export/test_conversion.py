"""Every pair of formats: the same weights to the bit, the same embeddings; and what must be refused."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from golden import GOLDEN, fill, golden_encoder
from tiny import ds_tree, tiny_config

import miles_fast
from launch import export
from miles_fast.config import ModelConfig, TextEncoderConfig
from miles_fast.data.vocabulary import build_vocabulary
from miles_fast.export import graphs
from miles_fast.export.pretrained import Pretrained, build_model, read_pretrained, with_frames
from miles_fast.export.run import write_pretrained
from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.models.torchvision_cpu import repair_torchvision

FILES = {"official": "x.pth", "frozen": "x.pth", "hf": "x", "safetensors": "x"}


def again(found: Pretrained, kind: str, folder, tokenizer) -> Pretrained:
    """Out as one kind and in again."""
    written, _ = write_pretrained(found, kind, folder / FILES[kind])
    bare = kind in ("official", "frozen")
    return read_pretrained(written, kind, tokenizer=str(tokenizer) if bare else None)


def assert_same_weights(one: Pretrained, two: Pretrained) -> None:
    assert one.weights.keys() == two.weights.keys()
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)


@pytest.mark.parametrize("kind", FILES)
def test_a_round_trip_keeps_every_bit_and_every_embedding(ours, data, tmp_path, kind):
    found = read_pretrained(ours)
    back = again(found, kind, tmp_path, data / "tokenizer")
    assert_same_weights(found, back)
    assert back.config.video == found.config.video and back.vocabulary_size == found.vocabulary_size
    video, captions = torch.randn(3, 2, 3, 32, 32), ["a red dog moves", "a blue car moves"]
    first = miles_fast.load(ours)
    second = miles_fast.load(tmp_path / FILES[kind], tokenizer=back.tokenizer)  # kind: seen by itself
    assert torch.equal(first.encode_video(video), second.encode_video(video))
    assert torch.equal(first.encode_text(captions), second.encode_text(captions))


@pytest.mark.parametrize("kind", ["safetensors", "official"])
def test_a_link_stays_one_and_what_it_names_is_written(ours, data, tmp_path, kind):
    """Twice: what is there already is replaced."""
    place, link = tmp_path / "disk" / FILES[kind], tmp_path / FILES[kind]
    place.parent.mkdir()
    link.symlink_to(place)
    found = read_pretrained(ours)
    for _ in range(2):
        assert_same_weights(found, again(found, kind, tmp_path, data / "tokenizer"))
        assert link.is_symlink() and place.exists() and not place.is_symlink()


def test_any_kind_leads_to_any_other(ours, data, tmp_path):
    start = found = read_pretrained(ours)
    for number, kind in enumerate(["frozen", "hf", "official", "safetensors", "hf", "frozen", "official"]):
        (tmp_path / str(number)).mkdir()
        found = again(found, kind, tmp_path / str(number), data / "tokenizer")
    assert_same_weights(start, found)


def test_frozen_names_its_text_projection_otherwise(ours, data, tmp_path):
    path, _ = write_pretrained(read_pretrained(ours), "frozen", tmp_path / "f.pth")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert "txt_proj.1.weight" in state and not [name for name in state if name.startswith("text_proj")]
    with pytest.raises(ValueError, match="txt_proj.1.*use --from frozen"):
        read_pretrained(path, "official", tokenizer=str(data / "tokenizer"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_from_a_zero_checkpoint_directly(data, tmp_path, stage):
    from miles_fast.training.ds_config import check_ds_config
    from miles_fast.training.loop import pretrain

    seen = []

    def evaluate(model, device):
        seen.append(model.embed_video(torch.ones(1, 2, 3, 32, 32)).detach())
        return {}

    config = tiny_config(data, run={"folder": str(tmp_path / "run"), "steps": 2})
    settings = check_ds_config(ds_tree(stage=stage), "ds.json", config, cuda=False, ranks=1)
    pretrain(config, settings, evaluate=evaluate)
    found = read_pretrained(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert found.run == tmp_path / "run" and found.step == 2
    assert not [name for name in found.weights if name.startswith("pretraining.")]
    back = again(found, "official", tmp_path, data / "tokenizer")
    with torch.no_grad():
        own = build_model(back).embed_video(torch.ones(1, 2, 3, 32, 32))
    torch.testing.assert_close(own, seen[-1], atol=1e-6, rtol=1e-6)
    write_pretrained(found, "hf", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    for said in ("2 of 2 steps, seed 0", "view A", "clips/s (median", "4 clips a step", "train/*.tar"):
        assert said in card, said


def test_timm_takes_the_image_tower_and_gives_it_back(ours, tmp_path):
    repair_torchvision()
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    found = read_pretrained(ours)
    path, remark = write_pretrained(found, "timm", tmp_path / "tower.safetensors")
    assert "image tower only" in remark
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    vit.load_state_dict(load_file(path), strict=True)
    # Without its temporal branch the encoder is this ViT on one frame.
    still = {
        n: torch.zeros_like(t) if "temporal" in n or "timeattn.proj" in n else t
        for n, t in found.weights.items()
    }
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = build_model(dataclasses.replace(found, weights=still)).video_model(image[:, None])
        torch.testing.assert_close(tokens, vit.eval().forward_features(image), atol=1e-5, rtol=1e-5)
    assert_same_weights(found, read_pretrained(path, "timm", base=ours))
    with pytest.raises(ValueError, match="name the model to put it into with --base"):
        read_pretrained(path, "timm")


@pytest.mark.parametrize("frames", [1, 2, 5, 16])
def test_other_numbers_of_frames_are_the_encoders_own_interpolation(ours, data, tmp_path, frames):
    found = read_pretrained(ours)
    other = with_frames(found, frames)
    assert other.weights["video_model.temporal_embed"].shape == (1, frames, 24)
    assert ("2 -> " in str(other.notes)) == (frames != 2)
    back = again(other, "official", tmp_path, data / "tokenizer")
    video = torch.randn(2, frames, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(build_model(found).embed_video(video), build_model(back).embed_video(video))


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Pretrained:
    """The published video encoder with the spec's weights, beside a small text encoder with heads of 64."""
    tokenizer = tmp_path_factory.mktemp("golden") / "tokenizer"
    build_vocabulary(["a dog jumps into water"], tokenizer)
    text = TextEncoderConfig(
        tokenizer=str(tokenizer), width=64, depth=1, heads=1, hidden=64, max_positions=16
    )
    size = len(load_tokenizer(tokenizer))
    model = DualEncoder(ModelConfig(text=text), size)
    model.video_model.load_state_dict(golden_encoder("sdpa", torch.float32).state_dict())
    return Pretrained(
        weights=model.state_dict(), config=model.config, vocabulary_size=size, tokenizer=str(tokenizer)
    )


def assert_golden(tokens: torch.Tensor) -> None:
    first, norm, total = GOLDEN[1]
    torch.testing.assert_close(tokens[0, 0, :6], torch.tensor(first), atol=2e-5, rtol=0)
    assert abs(float(tokens[:, 0].norm()) - norm) < 1e-3 and abs(float(tokens.sum()) - total) < 0.5


@torch.inference_mode()
def test_golden_vectors_after_each_conversion(golden, tmp_path):
    model = DualEncoder(golden.config, golden.vocabulary_size).eval()
    for kind in FILES:
        (tmp_path / kind).mkdir()
        model.load_state_dict(again(golden, kind, tmp_path / kind, golden.tokenizer).weights)
        assert_golden(model.video_model((4 * fill((2, 1, 3, 224, 224), 1000)).float()))
        for parameter in model.parameters():
            parameter.zero_()


@pytest.mark.skipif("MILES_FAST_SLOW" not in os.environ, reason="MILES_FAST_SLOW: a minute of a whole core")
def test_golden_vectors_in_onnxruntime(golden, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'miles-fast[onnx]'")
    folder, _ = write_pretrained(with_frames(golden, 1), "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(folder / "video_encoder.onnx"))
    video = (4 * fill((2, 1, 3, 224, 224), 1000)).float().numpy()
    (tokens,) = session.run(["token_features"], {"video": video})
    assert_golden(torch.from_numpy(tokens))


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@torch.inference_mode()
def test_graphs_take_any_batch_and_any_length(ours, tmp_path, kind):
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'miles-fast[onnx]'")
    folder, _ = write_pretrained(read_pretrained(ours), kind, tmp_path / "graphs")
    model = miles_fast.load(ours)
    for batch, length in ((1, 5), (5, 12)):
        video = torch.randn(batch, 2, 3, 32, 32)
        ids = torch.randint(5, 40, (batch, length))
        attention = torch.ones_like(ids)
        attention[:, length - 2 :] = 0
        hidden = model.text_model(input_ids=ids, attention_mask=attention).last_hidden_state
        wanted = {
            "video_encoder": ((video,), model.encode_video(video)),
            "text_encoder": ((ids, attention), torch.nn.functional.normalize(model.text_proj(hidden[:, 0]))),
        }
        for name, (inputs, embedding) in wanted.items():
            if kind == "onnx":
                session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"))
                names = [node.name for node in session.get_inputs()]
                feed = {n: tensor.numpy() for n, tensor in zip(names, inputs, strict=True)}
                got = torch.from_numpy(session.run(["unit_embedding"], feed)[0])
            else:
                got = torch.export.load(folder / f"{name}.pt2").module()(*inputs)[0]
            torch.testing.assert_close(got, embedding, atol=1e-5, rtol=1e-5)


def official_state(ours) -> dict:
    return dict(read_pretrained(ours).weights)


def foreign(name: str):
    """A class of a module that is not there when the file is read."""
    module = types.ModuleType("parse_config_dist_multi")
    kind = type(name, (), {"__module__": module.__name__, "__qualname__": name})
    setattr(module, name, kind)
    sys.modules[module.__name__] = module
    return kind


def test_the_authors_own_objects_are_neither_imported_nor_run(golden, tmp_path):
    config = foreign("ConfigParser")()
    config._config, config._save_dir = {"arch": "MILES"}, __import__("pathlib").Path("saved/models")
    state = {f"module.{name}": tensor for name, tensor in golden.weights.items()}
    state["module.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    content = {"arch": "MILES", "epoch": 3, "state_dict": state, "monitor_best": 1.0, "config": config}
    torch.save(content, tmp_path / "MILES.pth")
    del sys.modules["parse_config_dist_multi"]
    found = read_pretrained(tmp_path / "MILES.pth", "official", tokenizer=golden.tokenizer)
    assert_same_weights(golden, found)
    assert found.config.video == dataclasses.replace(golden.config.video, weights=None)
    assert found.config.text.heads == 1 and "parse_config_dist_multi" not in sys.modules


@pytest.mark.parametrize(
    "call", [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (exec, "open({!r}, 'w')")]
)
def test_code_in_a_checkpoint_never_runs(ours, data, tmp_path, call):
    function, text = call
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return function, (text.format(str(mark)),)

    torch.save({"state_dict": official_state(ours), "config": Evil()}, tmp_path / "evil.pth")
    try:
        read_pretrained(tmp_path / "evil.pth", "official", tokenizer=str(data / "tokenizer"))
    except ValueError as error:
        assert "evil.pth" in str(error)
    assert not mark.exists()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s.pop("video_model.norm.bias"), "missing video_model.norm.bias"),
        (lambda s: s.update({"mask_token": torch.zeros(1)}), "unknown mask_token"),
        (
            lambda s: s.update({"vid_proj.0.bias": torch.zeros(3)}),
            r"vid_proj.0.bias is \(3,\), expected \(16,\)",
        ),
        (lambda s: s.pop("video_model.cls_token"), "video_model.cls_token"),
        (lambda s: s.update({"epoch": 3}), "no tensors under .'epoch'"),
    ],
)
def test_keys_that_do_not_fit_are_listed(ours, data, tmp_path, change, message):
    path, _ = write_pretrained(read_pretrained(ours), "official", tmp_path / "x.pth")
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        read_pretrained(path, "official", tokenizer=str(data / "tokenizer"))
    assert "x.pth" in str(caught.value)
    if "mask_token" in message:
        read_pretrained(path, "official", tokenizer=str(data / "tokenizer"), drop=["mask_token"])


def test_other_mistakes_name_the_file_and_the_remedy(ours, data, tmp_path):
    path, _ = write_pretrained(read_pretrained(ours), "official", tmp_path / "x.pth")
    build_vocabulary(["other words"], tmp_path / "other")
    with pytest.raises(ValueError, match="trained with one of .* tokens.*--tokenizer"):
        read_pretrained(path, "official", tokenizer=str(tmp_path / "other"))
    (tmp_path / "note.pth").write_text("not a checkpoint")
    with pytest.raises(
        ValueError, match="note.pth: not a checkpoint .* safely .no pickle that torch reads so.$"
    ):
        read_pretrained(tmp_path / "note.pth", "official")
    for content in (b"error\n", b"step-00000006\n", path.read_bytes()[:300], b"\x80\x02}q\x00X"):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(ValueError, match="cut.pth: not a checkpoint that can be read safely"):
            read_pretrained(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=f"weights of a model alone: name its folder, {ours}"):
        read_pretrained(ours / "model.safetensors")
    shutil.copy(ours / "model.safetensors", tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="image tower alone.*--from timm --base"):
        read_pretrained(tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"--to official writes one file; name it \*.pth"):
        write_pretrained(read_pretrained(ours), "official", tmp_path / "folder")
    state = {**official_state(ours), "video_model.patch_embed.proj.weight": torch.zeros(24, 3, 8, 8)}
    torch.save({"state_dict": state}, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="24 wide, no multiple of 64"):
        read_pretrained(tmp_path / "narrow.pth", "official", tokenizer=str(data / "tokenizer"))


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "target,there,named",
    [
        ("safetensors", {"config.json": "{}", "log.jsonl": ""}, "config.json"),
        ("safetensors", {"model.json": '{"layers": 12}', "model.safetensors": "x"}, "model.json"),
        ("safetensors", {"tokenizer/tokenizer.json": "{}"}, "tokenizer"),
        ("hf", {"config.json": '{"model_type": "bert"}', "model.safetensors": "x"}, "config.json"),
        ("hf", {"config.json": "[]", "model.safetensors": "x"}, "config.json"),
        ("hf", {"README.md": "mine"}, "README.md"),
        ("pt2", {"inputs.json": "not JSON"}, "inputs.json"),
        ("onnx", {"inputs.json": '{"video_encoder.pt2": {}}'}, "inputs.json"),
    ],
)
def test_a_folder_that_the_target_did_not_write_is_never_replaced(ours, tmp_path, target, there, named):
    for name, text in there.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"out holds {named}, .*would be lost; name a new folder"):
        write_pretrained(read_pretrained(ours), target, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("target", ["safetensors", "hf", "pt2"])
def test_an_earlier_export_is_replaced_unless_it_holds_more(ours, tmp_path, monkeypatch, target):
    monkeypatch.setattr(graphs, "_graphs", lambda found: ())  # half a minute of tracing
    found = read_pretrained(ours)
    write_pretrained(found, target, tmp_path / "out")
    written = contents(tmp_path)
    write_pretrained(found, target, tmp_path / "out")
    assert contents(tmp_path).keys() == written.keys()
    (tmp_path / "out" / "embedded").mkdir()
    (tmp_path / "out" / "embedded" / "set.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="out holds embedded, .*would be lost; name a new folder"):
        write_pretrained(found, target, tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_file_deep_in_an_earlier_export_is_spared_too(ours, tmp_path):
    write_pretrained(read_pretrained(ours), "safetensors", tmp_path / "out")
    (tmp_path / "out" / "tokenizer" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out holds tokenizer/notes.txt, "):
        write_pretrained(read_pretrained(ours), "safetensors", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("frames", ["0", "-1"])
def test_no_frames_are_refused_in_one_line(ours, tmp_path, monkeypatch, frames):
    arguments = ["export.py", str(ours), "--output", str(tmp_path / "out"), "--frames", frames]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(ValueError, match=f"^--frames {frames}: must be at least 1$"):
        export.main()
    assert not (tmp_path / "out").exists()


def test_hugging_face_takes_captions_as_long_as_the_model_does(ours, tmp_path):
    import miles_fast.export.hugging_face  # noqa: F401

    repair_torchvision()
    from transformers import AutoProcessor

    folder, _ = write_pretrained(read_pretrained(ours), "hf", tmp_path / "hf")
    processor, caption = AutoProcessor.from_pretrained(folder), ["a red dog moves " * 9]
    assert processor(text=caption)["input_ids"].shape == (1, 16)
    assert processor(text=caption, max_length=3)["input_ids"].shape == (1, 3)
    for length in (-1, 0, 2, 17):
        with pytest.raises(ValueError, match=f"max_length {length}: this model takes captions of 3 to 16"):
            processor(text=caption, max_length=length)


def test_the_models_cards_example_runs_as_it_is_written(ours, tmp_path):
    folder, _ = write_pretrained(read_pretrained(ours), "hf", tmp_path / "hf")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    code = (
        f"import numpy as np; frames = [np.zeros((40, 56, 3), np.uint8)] * 2\n{code}print(sorted(output))\n"
    )
    paths = {**os.environ, "PYTHONPATH": str(Path(miles_fast.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=paths, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "embeds" in run.stdout


def test_hugging_face_loads_it_by_its_own_classes(ours, tmp_path):
    from PIL import Image

    import miles_fast.export.hugging_face  # noqa: F401

    repair_torchvision()
    from transformers import AutoModel, AutoProcessor

    folder, _ = write_pretrained(read_pretrained(ours), "hf", tmp_path / "hf")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "MilesModel" and not model.training
    levels = [10, 60, 120, 200]
    frames = [torch.full((40, 56, 3), level, dtype=torch.uint8).numpy() for level in levels]
    inputs = processor(videos=[frames], text=["a red dog moves", "a car"])
    with torch.inference_mode():
        output = model(**inputs)
    own = miles_fast.load(ours)
    torch.testing.assert_close(output.video_embeds, own.encode_video(inputs["pixel_values"]))
    torch.testing.assert_close(output.text_embeds, own.encode_text(["a red dog moves", "a car"]))
    torch.testing.assert_close(output.logits_per_text, output.text_embeds @ output.video_embeds.T)
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "x.gif", save_all=True, append_images=pictures[1:], duration=100)
    torch.testing.assert_close(
        own.read_videos([tmp_path / "x.gif"]), inputs["pixel_values"], atol=0.02, rtol=0
    )
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert_same_weights(read_pretrained(ours), read_pretrained(tmp_path / "saved"))
    assert miles_fast.load(tmp_path / "saved").encode_text(["a car"]).shape == (1, 16)
