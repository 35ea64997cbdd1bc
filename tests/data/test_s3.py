"""Training from S3, as moto serves it: the batches of local files; what is wrong is named."""

import pytest
from data.dealing import config_of, same, take
from tiny import write_data, write_frames

from miles_fast.data import downloads
from miles_fast.data.locations import Access
from miles_fast.data.preparation import PreparationError, PreparationOptions, prepare
from miles_fast.data.remote_file import MissingError
from miles_fast.data.shards import ShardError, build_index

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (extra: remote)")
moto = pytest.importorskip("moto.server", reason="moto is not installed (extra: test)")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """(folder of the local shards, store, endpoint); the shards are s3://bucket/set/*.tar as well."""
    root = tmp_path_factory.mktemp("s3")
    write_data(root)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{name}", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = s3fs.S3FileSystem(endpoint_url=endpoint)
        store.mkdir("bucket")
        for path in write_frames(root / "set", 24, shards=4):
            build_index(path)
            for name in (path, path.with_suffix(".idx")):
                store.put_file(str(name), f"bucket/set/{name.name}")
        yield root, store, endpoint
    server.stop()


def access(endpoint):
    return Access(prefixes=("s3://bucket/set/",), attempts=2, timeout_seconds=5, s3_endpoint=endpoint)


def config(bucket, folder):
    root, _, endpoint = bucket
    train = [{"shards": ["s3://bucket/set/{00000..00003}.tar"]}]
    options = {"allowed_prefixes": ["s3://bucket/set"], "s3_endpoint": endpoint, "shuffle_shards": 1}
    return config_of(root, train, cache_folder=str(folder), cache_gib=0.001, **options)


def test_batches_equal_those_of_local_files(bucket, tmp_path):
    root, *_ = bucket
    local = config_of(root, [{"shards": [str(root / "set" / "*.tar")]}], shuffle_shards=1)
    found = take(config(bucket, tmp_path / "cache"), 0, 12)
    assert all(map(same, found, take(local, 0, 12)))
    assert all(map(same, found[5:], take(config(bucket, tmp_path / "cache"), 5, 7)))


def test_pieces_make_a_whole(bucket, monkeypatch, tmp_path):
    root, _, endpoint = bucket
    monkeypatch.setattr("miles_fast.data.s3_files._S3_PIECE", 10_000)
    file = downloads.describe("s3://bucket/set/00001.tar", access(endpoint))
    with open(tmp_path / "x", "wb") as out:
        downloads.download(file, out, access(endpoint))
    assert (tmp_path / "x").read_bytes() == (root / "set" / "00001.tar").read_bytes()


def test_what_is_wrong_is_named(bucket, tmp_path, monkeypatch):
    _, store, endpoint = bucket
    monkeypatch.setattr(downloads, "FIRST_WAIT_SECONDS", 0.01)
    with pytest.raises(MissingError, match="s3://bucket/set/none.tar: .*data.s3_endpoint"):
        downloads.describe("s3://bucket/set/none.tar", access(endpoint))
    with pytest.raises(ShardError, match="s3://other/x.tar: no prefix"):
        downloads.describe("s3://other/x.tar", access(endpoint))
    with pytest.raises(ShardError, match="s3://bucket/set/x.tar: 2 attempts failed.*ConnectionError"):
        downloads.describe("s3://bucket/set/x.tar", access("http://127.0.0.1:9"))
    store.pipe_file("bucket/set/changing.tar", b"one")
    file = downloads.describe("s3://bucket/set/changing.tar", access(endpoint))
    store.pipe_file("bucket/set/changing.tar", b"two")
    with open(tmp_path / "x", "wb") as out, pytest.raises(ShardError, match="changing.tar: changed on the"):
        downloads.download(file, out, access(endpoint))


def test_preparation_reads_what_a_pattern_matches(bucket, tmp_path, monkeypatch):
    root, _, endpoint = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    options = PreparationOptions(workers=1, frames=2, short_side=32, samples_per_shard=6)
    far = prepare(["s3://bucket/set/0000[0-2].tar", "s3://bucket/set/*3.tar"], tmp_path / "far", options)
    near = prepare([str(root / "set/*.tar")], tmp_path / "near", options)
    assert far.kept == 24 and len(far.shards) == 4
    assert [path.read_bytes() for path in far.shards] == [path.read_bytes() for path in near.shards]
    for name, said in (
        ("9.tar", "set/9.tar: S3 answers .*AWS_ENDPOINT_URL"),
        ("9*.tar", "matches nothing"),
    ):
        with pytest.raises(PreparationError, match=said):
            prepare([f"s3://bucket/set/{name}"], tmp_path / "none", options)
