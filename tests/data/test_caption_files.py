"""The forms in which data sets come with captions, on texts of those forms and on the real files."""

from __future__ import annotations

import pytest

from miles_fast.data.caption_files import ClipListError, read_captions
from miles_fast.data.clip_list import list_clips

WEBVID = "videoid,name,page_idx,page_dir,duration,contentUrl\n"


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.csv", 'file,caption\na.mp4,"x, y"\na.mp4,z\na.mp4,z\n', {("a.mp4",): ["x, y", "z"]}),
        ("a.csv", 'file,caption\na.mp4,"one\u2028two\nthree"\n', {("a.mp4",): ["one\u2028two\nthree"]}),
        ("a.csv", WEBVID + "17,A cat,3,000_050,PT1S,https://x/y.mp4\n", {("000_050/17", "17"): ["A cat"]}),
        ("a.csv", "videoid,name,page_dir\n17,A cat,\n", {("17",): ["A cat"]}),
        ("a.csv", "file,caption\na,x\n,\n", {("a",): ["x"]}),
        ("a.csv", "file,caption\na,x,,\n,,,\n", {("a",): ["x"]}),
        ("a.csv", "file,caption,note,note\na,x,1,2\n", {("a",): ["x"]}),
        ("a.tsv", "path\tcaption\na.mp4\tsaid\n", {("a.mp4",): ["said"]}),
        (
            "Train_GCC-training.tsv",
            '"a dog\thttps://x.org/p/d%20og.jpg?w=3\na "cat"\tpics/cat.jpg\nbird\thttp://x.org/\n\n',
            {
                ("d og.jpg",): ['"a dog'],
                ("pics/cat.jpg",): ['a "cat"'],
                ("http://x.org/",): ["bird"],
            },
        ),
        (
            "a.json",
            '{"a.mp4": {"caption": "x", "category": "y"}, "b": "z"}',
            {("a.mp4",): ["x"], ("b",): ["z"]},
        ),
        ("a.json", '{"a": ["x", "y"]}', {("a",): ["x", "y"]}),
        ("a.json", '[{"video": "v.avi", "caption": ["x", "y"]}]', {("v.avi",): ["x", "y"]}),
        (
            "a.json",
            '{"sentences": [{"video_id": "v7", "caption": "x"}, {"video_id": "v7", "caption": "y"}]}',
            {("v7",): ["x", "y"]},
        ),
        ("a.jsonl", '{"file": "a", "caption": "x"}\n\n{"file": "b"}\n', {("a",): ["x"], ("b",): []}),
    ],
)
def test_forms(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_captions(tmp_path / name) == expected


def test_a_name_that_no_file_system_takes_is_a_missing_file(tmp_path):
    (tmp_path / "a.tsv").write_text("a dog\thttp://h.org/" + "x" * 300 + ".jpg\n")
    assert [clip.problem for clip in list_clips(tmp_path, tmp_path / "a.tsv")] == ["file missing"]


def test_a_caption_column_is_chosen_by_name(tmp_path):
    table = tmp_path / "mira.csv"
    table.write_text("index,video_id,short_caption,dense_caption,fps\n7_v-1,v,short,long,30\n")
    assert read_captions(table, "dense_caption") == {("7_v-1",): ["long"]}
    with pytest.raises(ClipListError, match="--caption-column short_caption.*short_caption, dense_caption"):
        read_captions(table)
    with pytest.raises(ClipListError, match="entry 1 has no 'text'.*'dense_caption'"):
        read_captions(table, "text")
    (tmp_path / "a.json").write_text('{"a": {"text": "x"}}')
    assert read_captions(tmp_path / "a.json", "text") == {("a",): ["x"]}


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("a.csv", 'file,caption\na,"' + "x" * 200_000, "is not csv.*field larger"),
        ("a.tsv", "x\thttp://a/b.jpg\ny\n", "line 2 has 1 columns"),
        (
            "a.csv",
            "file,caption\na.mp4,a dog, running\n",
            "line 2 has 3 cells, the header 2: put captions with commas in quotes",
        ),
        ("a.tsv", 'file\tcaption\na\t"x\ny"\nb\tx\ty\n', "line 4 has 3 cells.*tabs in quotes"),
        (
            "a.csv",
            'file,caption\na,x\nb,"lone quote\nc,y\n',
            "line 3 is not csv.*end of data.*writes those inside",
        ),
        ("a.tsv", 'file\tcaption\na\t"quo" ted\n', "line 2 is not tsv"),
        ("a.csv", "file\tcaption\na\tx\n", "header is one cell.*separate cells by commas"),
        ("a.json", '{"a": "x", "b": "y", "a": "z"}', "is not json .the key 'a' stands there twice"),
        ("a.jsonl", '{"file": "a", "caption": "x", "caption": "y"}', "'caption' stands there twice"),
        ("a.csv", "file,caption,caption\na,x,y\n", "'caption' 2 times.*rename"),
        ("a.csv", "file,file,caption\na,b,y\n", "'file' 2 times"),
        (
            "a.csv",
            "file;caption\na.mp4;a dog\n",
            "header is one cell, 'file;caption': separate cells by commas",
        ),
        ("a.csv", "path,title\na.mp4,a dog\n", "and caption .or its name, by --caption-column.; it has"),
        ("a.json", '{"a": 1}', "'a' holds a int"),
        ("a.json", '"text"', "holds a str"),
        ("a.json", '[{"caption": ["x"], "id": 3}]', "entry 1 needs one of file.*it has.*'id'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ClipListError, match=f"(?s){name}.*{problem}"):
        read_captions(tmp_path / name)


def test_files_are_found_by_folder_name_or_stem(tmp_path):
    for path in ("000_050/17.mp4", "051_100/17.mp4", "18.mp4", "deep/19.webm"):
        (tmp_path / "clips" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / path).write_bytes(b"")
    rows = "17,a,1,051_100,,\n18,b,1,000_050,,\n19,c,1,,,\n17,d,1,999_999,,\n20,e,1,,,\n"
    (tmp_path / "webvid.csv").write_text(WEBVID + rows)
    found = list_clips(tmp_path / "clips", tmp_path / "webvid.csv")
    assert [clip.file for clip in found] == ["051_100/17.mp4", "18.mp4", "deep/19.webm", None, None]
    assert [clip.problem for clip in found[3:]] == ["file missing", "file missing"]
    assert [clip.captions for clip in found[:2]] == [("a",), ("b",)]


def test_real_files(real_captions, real_clips):
    webvid = read_captions(real_captions / "webvid_sample_20.csv")
    assert len(webvid) == 20
    assert webvid["054101_054150/5641526", "5641526"] == ["Horse grazing - seperated on green screen"]
    msrvtt = read_captions(real_captions / "msrvtt_caption_test.json")
    assert len(msrvtt) == 2990 and len(msrvtt[("video7010.mp4",)]) > 10
    msvd = read_captions(real_captions / "msvd_caption_test.json")
    assert ("eyhzdC936uk_15_27.avi",) in msvd
    with pytest.raises(ClipListError, match="entry 1 needs"):
        read_captions(real_captions / "msvd_training_label_1450.json")
    mira = real_captions / "miradata_100_samples.csv"
    with pytest.raises(ClipListError, match="main_object_caption, .*dense_caption"):
        read_captions(mira)
    short = read_captions(mira, "short_caption")
    assert short[("000000008783_AJp_ANXoGoM-000114",)] == ["A group of people looking at cars on display."]
    panda = list_clips(real_clips / "panda70m", real_captions / "panda70m_samples.json")
    assert len(panda) == 92 and all(clip.file and len(clip.captions) == 1 for clip in panda)
