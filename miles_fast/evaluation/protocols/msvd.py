"""MSVD: 670 test videos, every caption its own query (sentence to video)."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Pinned, Protocol, Split, of_captions


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """All descriptions with a split's list of names; for test also a json that lists its captions."""
    descriptions = ["AllVideoDescriptions.txt", *(["msvd_caption_test.json"] if part == "test" else [])]
    path = folder.annotation(*descriptions)
    if path.suffix == ".json":
        return of_captions(annotations.caption_list(path))
    wanted = annotations.names(folder.annotation(f"{part}_list.txt"))
    return of_captions(annotations.only(annotations.msvd(path), wanted, path))


PROTOCOL = Protocol(
    name="msvd",
    task="retrieval",
    source="AllVideoDescriptions.txt and YouTubeClips.tar of "
    "https://www.cs.utexas.edu/users/ml/clamp/videoDescription/; train_list.txt, val_list.txt, test_list.txt "
    "of https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msvd_data.zip (a pickle of captions is "
    "not read; msvd_caption_test.json: [{video, caption: [...]}] is, for test)",
    metric="R@1 / R@5 / R@10 / median rank, text to video, every caption a query among 670 videos",
    read=read,
    # Published caption counts differ by cleaning (27,763 in CLIP4Clip's): the videos are pinned.
    pinned={
        "test": Pinned(videos=670, names_sha256="8d2c6c42af984fd0"),
        "val": Pinned(videos=100),
        "train": Pinned(videos=1200),
    },
    verified="test: names counted in a real msvd_caption_test.json; val and train: the usual counts "
    "(1,200 / 100 / 670), no file was at hand",
    reported={
        "zero-shot": {
            "MILES": "44.4 / 76.2 / 87.0 / 2",
            "Frozen": "38.7 / 70.1 / 80.1 / 2",
            "MCQ": "43.6 / 74.9 / 84.9 / 2",
        },
        "fine-tuned": {
            "MILES": "53.9 / 83.5 / 90.2 / 1",
            "Frozen": "45.6 / 79.8 / 88.2 / 2",
            "MCQ": "52.0 / 82.8 / 90.0 / 1",
        },
    },
)
