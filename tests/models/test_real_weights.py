"""Real weights, where MILES_FAST_WEIGHTS names a folder with vit/vit_s14_timm.safetensors and text/."""

import os
from pathlib import Path

import pytest
import torch

from miles_fast.config import ModelConfig, TextEncoderConfig, VideoEncoderConfig
from miles_fast.models.dual_encoder import build_dual_encoder
from miles_fast.models.text_encoder import load_tokenizer
from miles_fast.models.torchvision_cpu import repair_torchvision

FOLDER = Path(os.environ.get("MILES_FAST_WEIGHTS", "nowhere"))


@pytest.mark.skipif(not (FOLDER / "text").is_dir(), reason="MILES_FAST_WEIGHTS: real weights are not here")
@torch.inference_mode()
def test_a_real_vit_and_a_real_distilbert_load_and_give_their_own_features():
    repair_torchvision()
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer
    from transformers import DistilBertModel

    file = FOLDER / "vit" / "vit_s14_timm.safetensors"
    config = ModelConfig(
        video=VideoEncoderConfig(patch_size=14, width=384, depth=12, heads=6, weights=str(file)),
        text=TextEncoderConfig(weights=str(FOLDER / "text")),
    )
    tokenizer = load_tokenizer(FOLDER / "text")
    model = build_dual_encoder(config, len(tokenizer)).eval()
    vit = VisionTransformer(patch_size=14, embed_dim=384, depth=12, num_heads=6, num_classes=0).eval()
    vit.load_state_dict(load_file(file))
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(
        model.video_model(image[:, None]), vit.forward_features(image), atol=1e-4, rtol=1e-4
    )
    inputs = tokenizer(["a dog jumps into water"], return_tensors="pt")
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    text = DistilBertModel.from_pretrained(FOLDER / "text").eval()
    expected = text(input_ids=ids, attention_mask=attention).last_hidden_state[:, 0]
    torch.testing.assert_close(model.embed_text(ids, attention), model.text_proj(expected))
    assert model.config.text.width == 384 and model.config.text.weights is None
