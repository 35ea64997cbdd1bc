"""Something-Something V2, multiple choice: which of several captions is true of the clip."""

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder
from miles_fast.evaluation.protocol import Part, Protocol, Split


def read(folder: DataFolder, part: Part, fold: int) -> Split:
    """The options and answers that TVTS published; there is only this one part."""
    if part != "test":
        raise ValueError("ssv2_mc has a test part only; train on ssv2_templates")
    found = annotations.choices(folder.annotation("ssv2_mc_val.jsonl", "val.jsonl"))
    return Split(
        videos=list(found),
        captions=[options for options, _ in found.values()],
        labels=[answer for _, answer in found.values()],
    )


PROTOCOL = Protocol(
    name="ssv2_mc",
    task="multiple choice",
    source="meta_data/ssv2/mc/val.jsonl ({clip_name, options, answer} a line) of "
    "https://github.com/TencentARC/TVTS; videos of https://www.qualcomm.com/developer/software/something-something-v-2-dataset",
    metric="accuracy of the best option",
    read=read,
    pinned={},
    verified="nothing is pinned: the file was not at hand",
    reported={"zero-shot": {"MILES, Frozen, MCQ, UMT": "none reported"}},
)
