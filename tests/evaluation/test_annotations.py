"""Annotation files: the real ones beside the checkout, the forms of the others, and what is refused."""

import json

import pytest

from miles_fast.evaluation import annotations
from miles_fast.evaluation.data_folder import DataFolder, MissingVideosError
from miles_fast.evaluation.protocol import digest
from miles_fast.evaluation.protocols import NAMES, find_protocol


@pytest.fixture
def real(shared):
    folder = shared / "captions"
    if not (folder / "msrvtt_caption_test.json").is_file():
        pytest.skip(f"{folder}: real caption files are not here")
    return folder


def write(folder, **files):
    """Files by name, dots written as two underscores; returns the folder as a data set."""
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return DataFolder(folder)


def test_the_real_msrvtt_and_msvd_are_the_pinned_splits(real):
    for name, videos, captions in (("msrvtt_full", 2990, 59800), ("msvd", 670, 27763)):
        protocol = find_protocol(name)
        split = protocol.read(DataFolder(real), "test", 0)
        assert (len(split.videos), sum(map(len, split.captions))) == (videos, captions)
        protocol.check(split, "test", DataFolder(real))
        assert digest(split.videos) == protocol.pinned["test"].names_sha256
    assert split.videos[0] == "eyhzdC936uk_15_27.avi" and split.captions[0][0] == "a boy playing with dog."


def test_the_official_msrvtt_json_gives_what_the_list_of_captions_gives(real, tmp_path):
    listed = json.loads((real / "msrvtt_caption_test.json").read_text())
    names = [entry["video"].removesuffix(".mp4") for entry in listed]
    videos = [{"video_id": name, "split": "test"} for name in names]
    videos.append({"video_id": "video0", "split": "train"})
    pairs = [(n, text) for n, entry in zip(names, listed, strict=True) for text in entry["caption"]]
    sentences = [{"sen_id": i, "video_id": n, "caption": text} for i, (n, text) in enumerate(reversed(pairs))]
    sentences.append({"sen_id": 0, "video_id": "video0", "caption": "a train video"})
    tree = {"info": {}, "videos": videos, "sentences": sentences}
    folder = write(tmp_path, MSRVTT_data__json=json.dumps(tree))
    split = find_protocol("msrvtt_full").read(folder, "test", 0)
    assert split.videos == names
    assert [sorted(said) for said in split.captions] == [sorted(entry["caption"]) for entry in listed]
    find_protocol("msrvtt_full").check(split, "test", folder)


def test_a_shortened_or_other_split_is_refused(real, tmp_path):
    listed = json.loads((real / "msvd_caption_test.json").read_text())
    protocol = find_protocol("msvd")
    folder = write(tmp_path, msvd_caption_test__json=json.dumps(listed[:-1]))
    with pytest.raises(ValueError, match="669 videos, the protocol's has 670"):
        protocol.split(folder)
    listed[0]["video"] = "another_1_2.avi"
    folder = write(tmp_path, msvd_caption_test__json=json.dumps(listed))
    with pytest.raises(ValueError, match="another split of the same size"):
        protocol.split(folder)


def test_missing_videos_are_named_one_by_one(real):
    with pytest.raises(
        MissingVideosError, match="670 of 670 videos are missing: eyhzdC936uk_15_27.avi"
    ) as caught:
        find_protocol("msvd").split(DataFolder(real))
    assert len(caught.value.missing) == 670


def test_the_forms_of_the_other_data_sets(tmp_path):
    folder = write(
        tmp_path,
        MSRVTT_JSFUSION_test__csv='key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a, b"\n',
        AllVideoDescriptions__txt="# header\nmv89psg6zh4_33_46 a bird in a sink\nmv89psg6zh4_33_46 a bird\n"
        "-wa0umYJVGg_168_176 a dog\n",
        test_list__txt="mv89psg6zh4_33_46\n",
        LSMDC16_challenge_1000_publictect__csv="3009_A_00.00.47.510-00.00.51.160\t1\t2\t3\t4\tHe runs.\n",
        test_data__json=json.dumps(
            [
                {"video": "1@N2_3.mov", "description": "a cat", "times": [[0, 0]], "annotation_id": 1},
                {"video": "4.mp4", "description": "a cow", "times": [[0, 0]], "annotation_id": 2},
                {"video": "1@N2_3.mov", "description": "it jumps ", "times": [[1, 1]], "annotation_id": 3},
            ]
        ),
        classInd__txt="1 ApplyEyeMakeup\n2 YoYo\n",
        testlist02__txt="YoYo/v_YoYo_g01_c01.avi\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n",
        trainlist02__txt="YoYo/v_YoYo_g08_c01.avi 2\n",
        val__csv="label,youtube_id,time_start,time_end,split\n"
        '"air drumming",-0a1,3,13,val\nyoga,bc,120,130,val\n',
        labels__json=json.dumps({"Pushing [something]": "1", "Lifting [something] up": "0"}),
        validation__json=json.dumps(
            [
                {
                    "id": "78687",
                    "label": "pushing a pen",
                    "template": "Pushing [something]",
                    "placeholders": ["a pen"],
                }
            ]
        ),
        ssv2_mc_val__jsonl='{"clip_name": "7.webm", "options": ["push", "pull"], "answer": 1}\n',
    )

    def read(name, part="test", fold=0):
        return find_protocol(name).read(folder, part, fold)

    assert read("msrvtt_1ka").captions == [["a, b"]] and read("msrvtt_1ka").videos == ["video9770"]
    assert read("msvd").captions == [["a bird in a sink", "a bird"]]
    assert read("lsmdc").videos == ["3009_A_00.00.47.510-00.00.51.160"]
    assert read("lsmdc").captions == [["He runs."]]
    assert read("didemo").captions == [["a cat it jumps"], ["a cow"]]
    assert read("ucf101", fold=2).labels == [1, 0] and read("ucf101", fold=2).classes[0] == "apply eye makeup"
    assert read("ucf101", "train", 2).videos == ["YoYo/v_YoYo_g08_c01.avi"]
    labels, classes = annotations.kinetics(tmp_path / "val.csv")
    assert labels == {"-0a1_000003_000013": 0, "bc_000120_000130": 1} and classes == ["air drumming", "yoga"]
    with pytest.raises(ValueError, match="2 classes; Kinetics has 400, 600 or 700"):
        read("kinetics")
    assert read("ssv2_templates").labels == [1]
    assert read("ssv2_templates").classes == ["Lifting something up", "Pushing something"]
    assert (read("ssv2_mc").captions, read("ssv2_mc").labels) == ([["push", "pull"]], [1])


def test_hmdb51_takes_51_classes_and_leaves_out_unused_clips(tmp_path):
    for number in range(51):
        text = f"a_{number}.avi 1 \nb_{number}.avi 2 \nc_{number}.avi 0 \n"
        (tmp_path / f"class_{number:02d}_test_split1.txt").write_text(text)
    split = find_protocol("hmdb51").read(DataFolder(tmp_path), "test", 1)
    assert split.videos[3] == "b_3.avi" and split.labels == list(range(51)) and split.classes[3] == "class 03"
    (tmp_path / "class_50_test_split1.txt").unlink()
    with pytest.raises(ValueError, match="50 files CLASS_test_split1.txt, HMDB51 has 51"):
        find_protocol("hmdb51").read(DataFolder(tmp_path), "test", 1)


REFUSED = {
    "a list with a doubled video": (
        annotations.caption_list,
        '[{"video": "a.mp4", "caption": "x"}, {"video": "a.mp4", "caption": "y"}]',
        "a.mp4 is there twice",
    ),
    "a video without captions": (
        annotations.caption_list,
        '[{"video": "a.mp4", "caption": []}]',
        r"entry 1 \(a.mp4\): caption is empty",
    ),
    "training captions without names": (
        annotations.caption_list,
        '[{"caption": ["x"], "id": 3}]',
        "entry 1 has no video",
    ),
    "a caption without its video": (
        annotations.msrvtt,
        '{"videos": [], "sentences": [{"video_id": "video1", "caption": "x"}]}',
        "sentence 1 is of video1, which is not among the videos",
    ),
    "half a download": (annotations.msrvtt, '{"videos": [', "is not json .* download it again"),
    "commas for tabs": (
        annotations.lsmdc,
        "3009_A,1,2,3,4,someone runs\n",
        "line 1 has 1 columns parted by tabs",
    ),
    "another csv": (annotations.msrvtt_jsfusion, "video,caption\na,b\n", "the header is"),
    "one class": (annotations.ucf101_classes, "1 YoYo\n", "recognition needs at least two"),
    "classes from nought": (annotations.ucf101_classes, "0 YoYo\n1 Polo\n", "is not `1 ClassName`"),
    "one kind of Kinetics": (
        annotations.kinetics,
        "label,youtube_id,time_start,time_end,split\nyoga,a,1,2,val\n",
        "recognition needs at least two",
    ),
    "a captions file for MSVD": (annotations.msvd, "vid1 a dog\n", "line 1 is not `id_start_end caption`"),
    "a csv cut off within its last line": (
        annotations.kinetics,
        "label,youtube_id,time_start,time_end,split\nyoga,a,1,2,val\ndancing,b,3",
        "line 3 needs label, youtube_id, time_start, time_end",
    ),
    "a csv of another encoding": (
        annotations.msrvtt_jsfusion,
        b"key,vid_key,video_id,sentence\nret0,msr1,video1,a caf\xe9\n",
        "is not UTF-8",
    ),
    "a name doubled in a split": (annotations.names, "a_1_2\na_1_2\n", "a_1_2 is there twice"),
    "a clip doubled in a split": (
        lambda path: annotations.ucf101_split(path, ["YoYo"]),
        "YoYo/v_1.avi\nYoYo/v_1.avi\n",
        "line 2: YoYo/v_1.avi is there twice",
    ),
    "a clip doubled in a class": (
        lambda path: annotations.hmdb51_split([path], "test"),
        "a.avi 2\na.avi 2\n",
        "line 2: a.avi is there twice",
    ),
    "numbers that leave one out": (annotations.ssv2_labels, '{"a": "0", "b": "2"}', "numbers from 0 on"),
    "options that are none": (
        annotations.choices,
        '{"clip_name": "a", "options": "xy", "answer": 1}',
        "options must be texts",
    ),
    "an answer beyond the options": (
        annotations.choices,
        '{"clip_name": "a", "options": ["x", "y"], "answer": 2}',
        "answer 2 of 2 options",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_the_file_and_the_place(tmp_path, case):
    read, text, message = REFUSED[case]
    path = tmp_path / "annotation.file"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


WHOLE = {
    annotations.caption_list: '[{"video": "a.mp4", "caption": ["x"]}, {"video": "b.mp4", "caption": "y"}]',
    annotations.msrvtt: '{"videos": [{"video_id": "v1", "split": "test"}], '
    '"sentences": [{"video_id": "v1", "caption": "x"}]}',
    annotations.msrvtt_jsfusion: 'key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a, b"\n',
    annotations.msvd: "mv89psg6zh4_33_46 a bird in a sink\n",
    annotations.lsmdc: "3009_A_00.00.47.510-00.00.51.160\t1\t2\t3\t4\tHe runs.\n",
    annotations.didemo: '[{"video": "1.mov", "description": "a cat", "times": [[0, 0]]}]',
    annotations.ucf101_classes: "1 YoYo\n2 Polo\n",
    annotations.kinetics: 'label,youtube_id,time_start,time_end,split\n"air drumming",-0a1,3,13,val\n',
    annotations.ssv2_labels: '{"Pushing [something]": "1", "Lifting [something] up": "0"}',
    annotations.choices: '{"clip_name": "7.webm", "options": ["push", "pull"], "answer": 1}\n',
}


@pytest.mark.parametrize("read", WHOLE, ids=lambda read: read.__name__)
def test_a_file_that_is_cut_off_or_spoiled_at_any_byte_is_read_or_refused_by_name(tmp_path, read):
    path, whole = tmp_path / "annotation.file", WHOLE[read].encode()
    spoiled = [whole[:i] for i in range(len(whole))]
    spoiled += [whole[:i] + b"\xff" + whole[i + 1 :] for i in range(0, len(whole), 5)]
    for content in [*spoiled, b"null", b"3", b"[null]", b'{"a": null}', b'{"videos": 3, "sentences": 4}']:
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as error:
            assert str(path) in str(error), content


def test_files_are_found_by_name_with_another_extension_and_folder_but_never_guessed(tmp_path):
    for name in ("a/v_1.mp4", "b/v_2.avi", "c/v_2.avi", "c/v_1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = DataFolder(tmp_path)
    assert [file.path for file in folder.videos(["Some/v_1.avi"])] == [str(tmp_path / "a/v_1.mp4")]
    assert [file.path for file in folder.videos(["c/v_2.avi"])] == [str(tmp_path / "c/v_2.avi")]
    with pytest.raises(ValueError, match="video v_2.avi is there 2 times"):
        folder.videos(["v_2.avi"])
    with pytest.raises(ValueError, match="1 videos are listed twice: v_1"):
        folder.videos(["v_1", "v_1"])
    with pytest.raises(ValueError, match="annotation file missing: x.csv or y.csv"):
        folder.annotation("x.csv", "y.csv")


def test_every_protocol_says_where_its_files_come_from_and_what_others_report():
    for name in NAMES:
        about = find_protocol(name).about()
        assert "https://" in about and "ties count half" in about and "reported" in about
        assert "at hand" in about and "pins verified: " in about
    with pytest.raises(ValueError, match="expected one of msrvtt_1ka"):
        find_protocol("msrvtt")
