"""Training from a web server: the batches of local files, through a cache that is smaller than the set."""

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from data import malicious
from data.dealing import config_of, same, take
from data.serving import serving
from tiny import write_data, write_frames

from miles_fast.data import downloads
from miles_fast.data.batches import Quarantine
from miles_fast.data.loader import EvaluationLoader
from miles_fast.data.prefetch import SequentialPrefetcher
from miles_fast.data.shards import ShardError, build_index
from miles_fast.models.text_encoder import load_tokenizer

SIZE = 122880
NUM_SHARDS = 8


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    write_data(root)
    for path in write_frames(root / "set", 48, shards=NUM_SHARDS):
        os.truncate(path, SIZE)
        build_index(path)
    with serving(root / "set") as server:
        yield root, server


def remote(web, folder: Path, **options):
    root, server = web
    train = [{"shards": [server.url + "/{00000..00007}.tar"]}]
    options = {"shuffle_shards": 2, "cache_gib": 4.5 * SIZE / 2**30, "download_timeout_seconds": 5, **options}
    return config_of(root, train, allowed_prefixes=[server.url], cache_folder=str(folder), **options)


def local(web, **options):
    root, _ = web
    return config_of(root, [{"shards": [str(root / "set" / "*.tar")]}], shuffle_shards=2, **options)


class Watch:
    """The most bytes that a cache held."""

    def __init__(self, folder):
        self.folder, self.most, self._done = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        while not self._done.wait(0.002):
            held = 0
            for path in self.folder.glob("[!.]*.*"):
                try:
                    held += path.stat().st_size if path.suffix in (".tar", ".partial") else 0
                except FileNotFoundError:
                    pass
            self.most = max(self.most, held)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def test_two_epochs_equal_local_files_and_the_bound_holds(web, tmp_path):
    _, server = web
    before = server.gets()
    with Watch(tmp_path / "cache") as watch:
        found = take(remote(web, tmp_path / "cache"), 0, 24)
    expected = take(local(web), 0, 24)
    assert all(map(same, found, expected))
    for epoch in (found[:12], found[12:]):
        assert sorted(key for batch in epoch for key in batch.keys) == [f"{i:04d}" for i in range(48)]
    assert 0 < watch.most <= 5 * SIZE  # one more may be seen under both of its names
    assert NUM_SHARDS <= server.gets() - before <= 3 * NUM_SHARDS


def test_a_killed_run_goes_on_with_the_same_batches(web, tmp_path):
    whole = take(remote(web, tmp_path / "one"), 0, 20)
    take(remote(web, tmp_path / "two"), 0, 3)
    for folder in ("two", "three"):  # what the killed run left; another host
        assert all(map(same, whole[7:], take(remote(web, tmp_path / folder), 7, 13)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_a_cache_and_deal_what_one_deals(web, tmp_path, ranks):
    joined = [batch.keys for batch in take(remote(web, tmp_path / "one"), 0, 9, batch=6)]
    config, parts = remote(web, tmp_path / "shared"), [None] * ranks

    def deal(rank):
        parts[rank] = take(config, 0, 9, batch=6 // ranks, rank=rank, ranks=ranks)

    threads = [threading.Thread(target=deal, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum((batch.keys for batch in step), ()) for step in zip(*parts, strict=True)] == joined


def test_a_batch_over_many_windows_and_a_mixture_with_local_images(web, tmp_path):
    root, server = web
    images = malicious.good(tmp_path / "images.tar", *(f"image{i}" for i in range(5)))
    train = [{"shards": [server.url + "/{00000..00007}.tar"], "weight": 2}, {"shards": [str(images)]}]
    options = {"allowed_prefixes": [server.url], "cache_folder": str(tmp_path / "cache"), "shuffle_shards": 1}
    config = config_of(root, train, cache_gib=2.5 * SIZE / 2**30, **options)
    batches = take(config, 0, 6, batch=24)
    kinds = ["image" if "image" in batch.keys[0] else "remote" for batch in batches]
    assert kinds == ["remote", "remote", "image"] * 2
    keys = [key for batch, kind in zip(batches, kinds, strict=True) if kind == "remote" for key in batch.keys]
    assert sorted(keys[:48]) == sorted(keys[48:]) == [f"{i:04d}" for i in range(48)]


def test_a_bad_sample_is_replaced_from_its_window(web, tmp_path):
    # Substitutes out of the whole set would pull shards into the cache that no window needs.
    root, _ = web
    good, bad = (write_frames(tmp_path / name, 12, shards=4) for name in ("good", "bad"))
    data = bad[2].read_bytes()
    bad[2].write_bytes(data.replace(b"\xff\xd8\xff", b"not", 4))  # the frames of one sample
    with serving(tmp_path / "bad") as server:
        options = {
            "allowed_prefixes": [server.url],
            "cache_folder": str(tmp_path / "cache"),
            "shuffle_shards": 1,
        }
        remote = config_of(root, [{"shards": [server.url + "/{00000..00003}.tar"]}], **options)
        found = [int(key) for batch in take(remote, 0, 6, batch=6) for key in batch.keys]
    clean = config_of(root, [{"shards": [str(path) for path in good]}], shuffle_shards=1)
    expected = [int(key) for batch in take(clean, 0, 6, batch=6) for key in batch.keys]
    assert [key // 3 for key in found] == [key // 3 for key in expected]
    assert sum(map(int.__ne__, found, expected)) == expected.count(6) == 3


def evaluation(web, folder, batch, **options):
    root, _ = web
    config = remote(web, folder, shuffle_shards=1, **options)
    return EvaluationLoader(
        config.data.train[0],
        config.data,
        image_size=32,
        tokenizer=load_tokenizer(root / "tokenizer"),
        batch=batch,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("room", [1, 2, 9])
def test_evaluation_reads_remote_shards_in_order(web, tmp_path, room):
    _, server = web
    before = server.gets()
    loader = evaluation(web, tmp_path / "cache", 10, cache_gib=room * SIZE / 2**30)
    keys = [key for batch in loader.batches(Quarantine(None)) for key in batch.keys]
    assert keys == [f"{i:04d}" for i in range(48)]
    if room > NUM_SHARDS:
        assert server.gets() - before == NUM_SHARDS


def test_evaluation_downloads_the_next_shard_meanwhile(web, tmp_path):
    loader = evaluation(web, tmp_path / "cache", 1, cache_gib=9 * SIZE / 2**30)
    with contextlib.closing(SequentialPrefetcher(loader.shards, range(48), pending=3)) as ahead:
        ahead.coming(0, 0)  # nothing is read here: what comes was downloaded before it is needed
        deadline = time.monotonic() + 60
        while len(held := [path.name[:5] for path in (tmp_path / "cache").glob("*.tar")]) < 2:
            assert time.monotonic() < deadline, held
            time.sleep(0.01)
    assert sorted(held) == ["00000", "00001"]
    loader = evaluation(web, tmp_path / "other", 1, cache_gib=9 * SIZE / 2**30)
    assert len(list(loader.batches(Quarantine(None), range(6)))) == 6
    assert [path.name[:5] for path in (tmp_path / "other").glob("*.tar")] == ["00000"]


def test_a_cache_too_small_for_two_windows_is_named(web, tmp_path):
    config = remote(web, tmp_path / "cache", cache_gib=3.5 * SIZE / 2**30)
    with pytest.raises(ShardError, match="present and the next.*data.cache_gib.*data.shuffle_shards"):
        take(config, 0, 1)


def test_a_server_that_fails_for_good_stops_the_run_with_its_name(web, tmp_path, monkeypatch):
    _, server = web
    monkeypatch.setattr(downloads, "FIRST_WAIT_SECONDS", 0.01)
    server.faults["/00003.tar"] = [503] * 99
    try:
        with pytest.raises(ShardError, match=rf"{server.url}/00003.tar: 2 attempts failed.*503"):
            take(remote(web, tmp_path / "cache", download_attempts=2), 0, 24)
    finally:
        server.faults.clear()


def test_remote_shards_that_are_not_allowed_are_refused(web, tmp_path):
    root, server = web
    asked = sum(server.asked.values())
    config = config_of(root, [{"shards": [server.url + "/00000.tar"]}], cache_folder=str(tmp_path / "cache"))
    with pytest.raises(ShardError, match=rf"{server.url}/00000.tar: no prefix in data.allowed_prefixes"):
        take(config, 0, 1)
    assert sum(server.asked.values()) == asked and not (tmp_path / "cache").exists()
