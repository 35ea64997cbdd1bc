"""MSR-VTT, the official test split: 2990 videos, every one of their 20 captions a query."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Pinned, Protocol, Split, of_captions

_OFFICIAL = {"train": "train", "val": "validate", "test": "test"}


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """The official json with all splits; for test also one that lists its captions alone."""
    names = ["MSRVTT_data.json", "videodatainfo.json", "test_videodatainfo.json", "msrvtt_caption_test.json"]
    path = folder.annotation(*(names if part == "test" else names[:2]))
    return of_captions(annotations.msrvtt(path, _OFFICIAL[part]))


PROTOCOL = Protocol(
    name="msrvtt_full",
    task="retrieval",
    source="MSRVTT_data.json of https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip "
    "(or the challenge's test_videodatainfo.json, or msrvtt_caption_test.json: [{video, caption: [...]}]); "
    "videos of https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip",
    metric="R@1 / R@5 / R@10 / median rank, text to video, of 59,800 captions and 2,990 videos",
    read=read,
    pinned={
        "test": Pinned(videos=2990, captions=59800, names_sha256="916e9b2dd9a45181"),
        "val": Pinned(videos=497, captions=9940),
        "train": Pinned(videos=6513, captions=130260),
    },
    verified="test: videos, names and captions counted in a real msrvtt_caption_test.json; val and "
    "train: counts of the data set's paper (6,513 / 497 / 2,990 videos, 20 captions each), no "
    "file was at hand",
    reported={"zero-shot": {"MILES, Frozen, MCQ, UMT": "none reported on this split"}},
)
