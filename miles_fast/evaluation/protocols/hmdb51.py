"""HMDB51: 51 actions, three official splits, class names as texts."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Pinned, Protocol, Split, of_labels


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """The 51 files `CLASS_test_splitN.txt`; underscores become spaces."""
    files = folder.annotations(f"_test_split{fold}.txt")
    labels, classes = annotations.hmdb51_split(files, "train" if part == "train" else "test")
    if len(classes) != 51:
        raise ValueError(f"{folder.root}: {len(classes)} files CLASS_test_split{fold}.txt, HMDB51 has 51")
    return of_labels(labels, [name.replace("_", " ") for name in classes])


PROTOCOL = Protocol(
    name="hmdb51",
    task="actions",
    source="hmdb51_org.rar (the videos, a rar for each class inside) and test_train_splits.rar of "
    "https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/",
    metric="top-1 and top-5, mean of the three test splits",
    read=read,
    folds=(1, 2, 3),
    frames=(4, 16),
    pinned={
        f"{part}{fold}": Pinned(videos=51 * each)
        for fold in (1, 2, 3)
        for part, each in (("test", 30), ("train", 70))
    },
    verified="counts of the paper (70 and 30 clips of each class in each split); the files were not at hand",
    reported={
        "zero-shot top-1": {"MILES": "in its paper, not at hand", "Frozen": "27.5", "MCQ": "38.0"},
        "linear probe top-1": {"MILES": "60.0", "Frozen": "57.8", "MCQ": "60.7"},
        "fine-tuned top-1": {"MILES": "66.8", "Frozen": "65.6", "MCQ": "65.1"},
    },
)
