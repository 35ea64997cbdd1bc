"""DiDeMo, paragraph to video: all sentences of a video joined to one query."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Pinned, Protocol, Split, of_captions


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """The part's json, its sentences in the file's order."""
    return of_captions(annotations.didemo(folder.annotation(f"{part}_data.json")))


PROTOCOL = Protocol(
    name="didemo",
    task="retrieval",
    source="train_data.json, val_data.json, test_data.json of "
    "https://github.com/LisaAnne/LocalizingMoments/tree/master/data; its README leads to the videos",
    metric="R@1 / R@5 / R@10 / median rank, text to video, of 1004 paragraphs and 1004 videos",
    read=read,
    caption_tokens=100,  # inferred: no paper states its length; paragraphs have five sentences or so
    pinned={"test": Pinned(videos=1004, captions=1004), "val": Pinned(videos=1065, captions=1065)},
    verified="counts of the papers (videos of the test and validation set); no file was at hand, and "
    "train is not pinned",
    reported={
        "zero-shot": {
            "MILES": "27.2 / 50.3 / 63.6 / 5",
            "Frozen": "21.1 / 46.0 / 56.2 / 7",
            "MCQ": "25.6 / 50.6 / 61.1 / 5",
            "UMT-B/16 5M": "33.4 / 58.3 / 67.0 (CLIP teacher, cross-encoder)",
        },
        "fine-tuned": {
            "MILES": "36.6 / 63.9 / 74.0 / 3",
            "Frozen": "31.0 / 59.8 / 72.4 / 3",
            "MCQ": "37.0 / 62.2 / 73.9 / 3",
        },
    },
)
