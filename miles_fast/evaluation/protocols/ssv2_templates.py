"""Something-Something V2, templates: motion without objects, 174 templates against the validation clips."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Pinned, Protocol, Split, of_labels


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """The official json; test is its validation set, whose labels are public."""
    prefix = "train" if part == "train" else "validation"
    classes = annotations.ssv2_labels(folder.annotation("something-something-v2-labels.json", "labels.json"))
    path = folder.annotation(f"something-something-v2-{prefix}.json", f"{prefix}.json")
    return of_labels(annotations.ssv2_templates(path, classes), classes)


PROTOCOL = Protocol(
    name="ssv2_templates",
    task="templates",
    source="labels and videos of https://www.qualcomm.com/developer/software/something-something-v-2-dataset",
    metric="template to video R@1 / R@5 / R@10 (any clip of the template is right), video to template top-1 "
    "and top-5; again with the frames of each clip reversed: a model that is blind to motion scores the same",
    read=read,
    pinned={"test": Pinned(videos=24777), "train": Pinned(videos=168913)},
    verified="counts of the data set's site; the files were not at hand",
    reported={"zero-shot, this form": {"MILES, Frozen, MCQ, UMT": "none reported"}},
)
