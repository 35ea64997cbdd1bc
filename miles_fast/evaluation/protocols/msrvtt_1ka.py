"""MSR-VTT 1K-A, the jsfusion split: 1000 videos, one fixed caption each."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Pinned, Protocol, Split, of_captions


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """test: the csv. val: the 497 official validation videos. train: the others of the 10,000."""
    test = annotations.msrvtt_jsfusion(folder.annotation("MSRVTT_JSFUSION_test.csv"))
    if part == "test":
        return of_captions(test)
    path = folder.annotation("MSRVTT_data.json")
    validation = annotations.msrvtt(path, "validate")
    if part == "val":
        return of_captions(validation)
    everything = annotations.msrvtt(path)
    return of_captions({n: c for n, c in everything.items() if n not in test and n not in validation})


PROTOCOL = Protocol(
    name="msrvtt_1ka",
    task="retrieval",
    source="MSRVTT_JSFUSION_test.csv and MSRVTT_data.json (the latter for train and val) of "
    "https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip; MSRVTT.zip of "
    "https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip has the videos",
    metric="R@1 / R@5 / R@10 / median rank, text to video, of 1000 captions and 1000 videos",
    read=read,
    # Training is the usual 9,000 without the 497 of val: early stopping on the test set would be no test.
    pinned={
        "test": Pinned(videos=1000, captions=1000),
        "val": Pinned(videos=497, captions=9940),
        "train": Pinned(videos=8503, captions=170060),
    },
    verified="counts only, of the papers (1,000 of the 10,000 videos are the test, 497 the official "
    "validation set); no file of them was at hand",
    reported={
        "zero-shot": {
            "MILES": "26.1 / 47.2 / 56.9 / 7",
            "Frozen": "18.7 / 39.5 / 51.6 / 10 (its released weights: 21.7 / 43.4 / 53.4 / 8)",
            "MCQ": "26.0 / 46.4 / 56.4 / 7",
            "UMT-B/16 5M": "29.6 / 52.8 / 61.9 (CLIP teacher, cross-encoder)",
        },
        "fine-tuned": {
            "MILES": "37.7 / 63.6 / 73.8 / 3",
            "Frozen": "31.0 / 59.5 / 70.5 / 3",
            "MCQ": "37.6 / 64.8 / 75.1 / 3",
        },
    },
)
