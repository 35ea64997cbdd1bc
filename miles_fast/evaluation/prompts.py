"""Class names as texts: bare, in one sentence, or as the mean of several sentences."""

from __future__ import annotations

from torch import Tensor

from miles_fast.evaluation.embedding import Embedder
from miles_fast.models.dual_encoder import unit

# The paper's prompts are not public (spec/miles.md 5.3): all three are measured and reported by name.
PROMPTS: dict[str, tuple[str, ...]] = {
    "bare": ("{}",),
    "one": ("a person is {}",),
    "ensemble": (
        "a person is {}",
        "a video of a person {}",
        "a video of people {}",
        "someone is {}",
        "a man is {}",
        "a woman is {}",
        "a clip of {}",
        "this is a video about {}",
    ),
}


def class_embeddings(embedder: Embedder, classes: list[str], prompt: str, length: int) -> Tensor:
    """Unit embeddings (K, E) of K class names: the mean over the sentences of a prompt, normalised again."""
    templates = PROMPTS[prompt]
    texts = [template.format(name) for name in classes for template in templates]
    return unit(embedder.texts(texts, length).unflatten(0, (len(classes), len(templates))).mean(1))
