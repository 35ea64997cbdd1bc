"""Kinetics-400, -600 or -700 by its csv: class names as texts."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Protocol, Split, of_labels


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """`train.csv`, or `val.csv` (`validate.csv`) for test, whose labels are public."""
    names = ["train.csv"] if part == "train" else ["val.csv", "validate.csv", "test.csv"]
    path = folder.annotation(*names)
    labels, classes = annotations.kinetics(path)
    if len(classes) not in (400, 600, 700):
        raise ValueError(f"{path}: {len(classes)} classes; Kinetics has 400, 600 or 700")
    return of_labels(labels, classes)


PROTOCOL = Protocol(
    name="kinetics",
    task="actions",
    source="val.csv (label, youtube_id, time_start, time_end, split) and the clips, named "
    "id_start_end with six digits each, of https://github.com/cvdfoundation/kinetics-dataset",
    metric="top-1 and top-5 on the validation csv; clips vanish from YouTube: --allow-missing says how many",
    read=read,
    frames=(4, 16),
    pinned={},
    verified="nothing but the number of classes is checked: no csv was at hand, and its editions "
    "differ in length",
    reported={
        "linear probe top-1, 400 classes": {"MILES": "64.0", "Frozen": "62.9", "MCQ": "65.6"},
        "fine-tuned top-1, 400 classes": {"MILES": "77.4", "Frozen": "76.9", "MCQ": "77.8"},
    },
)
