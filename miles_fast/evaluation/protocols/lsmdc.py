"""LSMDC 2016: 1000 public test clips of films, one sentence each."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Pinned, Protocol, Split, of_captions

_FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """The part's csv; a clip named several times (in train) has several captions."""
    return of_captions(annotations.lsmdc(folder.annotation(_FILES[part])))


PROTOCOL = Protocol(
    name="lsmdc",
    task="retrieval",
    source=f"{', '.join(_FILES.values())} and the clips (avi) of "
    "https://sites.google.com/site/describingmovies/download, which asks for an agreement",
    metric="R@1 / R@5 / R@10 / median rank, text to video, of 1000 captions and 1000 clips",
    read=read,
    pinned={"test": Pinned(videos=1000, captions=1000)},
    verified="the test set's counts, of its name and the papers; no file was at hand, and train and "
    "val are not pinned",
    reported={
        "zero-shot": {
            "MILES": "11.1 / 24.7 / 30.6 / 50.7",
            "Frozen": "9.3 / 22.0 / 30.1 / 51",
            "MCQ": "12.2 / 25.9 / 32.2 / 42",
            "UMT-B/16 5M": "16.8 / 30.5 / 37.6 (CLIP teacher, cross-encoder)",
        },
        "fine-tuned": {
            "MILES": "17.8 / 35.6 / 44.1 / 15.5",
            "Frozen": "15.0 / 30.8 / 39.8 / 20",
            "MCQ": "17.9 / 35.4 / 44.5 / 15",
        },
    },
)
