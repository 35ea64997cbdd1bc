"""What a shard or its name must not be able to do: refused by name, without a side effect."""

import pytest
from data import malicious

from miles_fast.data.clips import ClipDraw, read_clip
from miles_fast.data.shards import ShardError, ShardSet, build_index

DRAW = ClipDraw(num_frames=1, takes="jpeg")


@pytest.fixture(autouse=True)
def nothing_else_is_written(tmp_path):
    yield
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left <= {"bad.tar", "bad.idx"}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", malicious.SHARDS)
def test_malicious_tars_are_refused_by_name(tmp_path, kind):
    build, message = malicious.SHARDS[kind]
    tar = build(tmp_path / "bad.tar")
    for use in (build_index, lambda path: ShardSet([path])):
        with pytest.raises(ShardError, match=rf"(?s)bad\.tar.*({message})"):
            use(tar)
    assert not tar.with_suffix(".idx").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("jpg 512 5000000000 a.jpg", "the limit of its kind"),
        ("jpg 512 100 a.jpg txt 512 5 a.txt", "overlap"),
        ("txt 1536 5 a.txt txt 512 3 a.txt", "'a.txt' twice"),
        ("jpg 512 999999 a.jpg", "names bytes up to"),
        ("jpg 512 100 /etc/a.jpg", "no name"),
        ("jpg 512 100 a.jpg txt 1536 5 ../a.txt", "no name"),
        ("jpg 99999999999999999999999999 1 a.jpg", "names bytes up to"),
    ],
)
def test_malicious_indexes_are_refused_by_name(tmp_path, line, message):
    tar = malicious.good(tmp_path / "bad.tar")
    tar.with_suffix(".idx").write_text(f"v1.2 1\n{line}\n")
    with pytest.raises(ShardError, match=rf"(?s)bad\.idx.*{message}"):
        ShardSet([tar])


def test_no_pickle_is_ever_loaded(tmp_path):
    proof = tmp_path / "proof"
    shards = ShardSet([malicious.with_pickles(tmp_path / "bad.tar", proof)])
    assert "pyd" in shards[0].extensions
    for again in range(2):
        assert read_clip(shards, 0, DRAW, None).caption == "a dog", again
        shards = ShardSet(shards.paths)  # by the index that the first one wrote
    assert not proof.exists()
