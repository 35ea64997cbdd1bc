"""UCF101: 101 actions, three official splits, class names as texts."""

import re

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Pinned, Protocol, Split, of_labels


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """`trainlist0N.txt` or `testlist0N.txt`; names in camel case become words."""
    classes = annotations.ucf101_classes(folder.annotation("classInd.txt"))
    path = folder.annotation(f"{'train' if part == 'train' else 'test'}list0{fold}.txt")
    return of_labels(annotations.ucf101_split(path, classes), [words(name) for name in classes])


def words(name: str) -> str:
    """'ApplyEyeMakeup' -> 'apply eye makeup'."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


PROTOCOL = Protocol(
    name="ucf101",
    task="actions",
    source="UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip of https://www.crcv.ucf.edu/data/UCF101.php",
    metric="top-1 and top-5, mean of the three test splits",
    read=read,
    folds=(1, 2, 3),
    frames=(4, 16),
    pinned={
        "test1": Pinned(videos=3783),
        "test2": Pinned(videos=3734),
        "test3": Pinned(videos=3696),
        "train1": Pinned(videos=9537),
        "train2": Pinned(videos=9586),
        "train3": Pinned(videos=9624),
    },
    verified="counts of the published lists as the literature gives them; the lists themselves were "
    "not at hand",
    reported={
        "zero-shot top-1": {"MILES": "in its paper, not at hand", "Frozen": "45.4", "MCQ": "51.1"},
        "linear probe top-1": {"MILES": "89.6", "Frozen": "88.7", "MCQ": "89.2"},
        "fine-tuned top-1": {"MILES": "92.1", "Frozen": "91.4", "MCQ": "92.9"},
    },
)
