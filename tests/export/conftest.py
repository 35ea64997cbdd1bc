"""A tiny model as a folder of ours, and its data."""

import pytest
import torch
from tiny import tiny_config, write_data

from miles_fast.models.dual_encoder import DualEncoder
from miles_fast.models.storage import write_model
from miles_fast.models.text_encoder import load_tokenizer


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """train/, heldout/ and tokenizer/ of tests/tiny.py."""
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


@pytest.fixture(scope="session")
def ours(data, tmp_path_factory):
    """A model folder with random weights, its temporal branch included."""
    torch.manual_seed(3)
    config = tiny_config(data).model
    model = DualEncoder(config, len(load_tokenizer(data / "tokenizer")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("model") / "ours"
    write_model(folder, model.state_dict(), model.config, model.vocabulary_size, str(data / "tokenizer"))
    return folder
