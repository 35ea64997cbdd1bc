"""The cache of remote shards: one download, a bound that holds, nothing in use pushed out, faults named."""

import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from data import malicious
from data.serving import serving
from tiny import write_frames

from miles_fast.data import downloads, shard_cache
from miles_fast.data.locations import Access
from miles_fast.data.prefetch import Prefetcher
from miles_fast.data.shard_cache import ShardCache
from miles_fast.data.shards import ShardError, ShardSet, build_index

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_WAIT_SECONDS", 0.01)
    (tmp_path / "web").mkdir()
    with serving(tmp_path / "web") as server:
        yield server


def shards_on(server, count=6, index=True):
    """Shards of 2 samples each on the server; their size is the same."""
    paths = write_frames(server.folder, 2 * count, shards=count)
    for path in paths:
        os.truncate(path, 40960)  # the end of a tar may be any number of zero blocks
        if index:
            build_index(path)
    return [f"{server.url}/{path.name}" for path in paths]


def cache_in(folder, server, shards=3.5, **options):
    options = {"attempts": 2, "timeout_seconds": 5, **options}
    return ShardCache(folder, int(shards * 40960), Access(prefixes=(server.url,), **options))


def held(cache):
    return sum(path.stat().st_size for path in cache.folder.glob("*") if path.suffix in (".tar", ".partial"))


def read_all(shards):
    return [shards[i].read("00.jpg") for i in range(len(shards))]


@pytest.mark.parametrize("index", [True, False])
def test_a_set_larger_than_the_cache_is_read(server, tmp_path, index, caplog):
    urls = shards_on(server, index=index)
    cache = cache_in(tmp_path / "cache", server)
    shards = ShardSet(urls, cache=cache)
    assert server.gets() == (0 if index else 6)
    assert caplog.text.count("downloaded once to be indexed") == (0 if index else 1)
    local = ShardSet(sorted(server.folder.glob("*.tar")))
    assert read_all(shards) == read_all(local)
    assert str(shards[3].shard) == urls[1] and urls[1] in str(shards[3])
    assert held(cache) <= cache.bound_bytes and len(list(cache.folder.glob("*.tar"))) == 3
    assert not list(cache.folder.glob("*.partial"))
    before = server.gets() + server.gets(".idx")
    again = pickle.loads(pickle.dumps(ShardSet(urls, cache=cache)))  # the indexes are kept
    assert again[11].read("00.jpg") == local[11].read("00.jpg")
    assert server.gets() + server.gets(".idx") == before


def test_what_is_pushed_out_at_once_is_indexed_by_its_one_download(server, tmp_path, monkeypatch):
    urls = shards_on(server, index=False)
    cache = cache_in(tmp_path / "cache", server)
    fetch = cache.fetch

    def fetch_and_lose(file):
        fetch(file)
        cache.path(file).unlink()

    monkeypatch.setattr(cache, "fetch", fetch_and_lose)
    assert len(ShardSet(urls, cache=cache)) == 12
    assert server.gets() == 6


def test_a_shard_that_lost_its_index_is_indexed_from_the_cache(server, tmp_path):
    urls = shards_on(server, 2, index=False)
    cache = cache_in(tmp_path / "cache", server)
    ShardSet(urls, cache=cache)
    for index in cache.folder.glob("*.idx"):
        index.unlink()
    assert len(ShardSet(urls, cache=cache)) == 4
    assert server.gets() == 2


def test_the_least_recently_used_goes_and_what_is_read_stays(server, tmp_path):
    urls = shards_on(server)
    cache = cache_in(tmp_path / "cache", server)
    files = [cache.look_up(url)[0] for url in urls]
    for file in files[:3]:
        assert cache.fetch(file)
        time.sleep(0.01)
    number = cache.open(files[1])
    cache.touch([cache.path(files[0])])
    assert cache.fetch(files[3])
    there = [cache.path(file).exists() for file in files]
    assert there == [True, True, False, True, False, False]  # 2: used before 0, and 1 is open
    assert not cache.fetch(files[4], keep=lambda: [cache.path(files[0]), cache.path(files[3])], wait=False)
    os.close(number)
    assert cache.fetch(files[4], keep=lambda: [cache.path(files[0]), cache.path(files[3])], wait=False)
    assert [cache.path(file).exists() for file in files] == [True, False, False, True, True, False]


def test_waiting_for_room_ends_with_a_name(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "MAX_ROOM_SECONDS", 0.3)
    urls = shards_on(server, 2)
    cache = cache_in(tmp_path / "cache", server, shards=1)
    one, two = (cache.look_up(url)[0] for url in urls)
    number = cache.open(one)
    with pytest.raises(ShardError, match=rf"{urls[1]}: no room in .*cache.*data.cache_gib"):
        cache.fetch(two)
    os.close(number)
    assert cache.fetch(two)


def test_a_shard_larger_than_the_cache_is_named(server, tmp_path):
    urls = shards_on(server, 2)
    with pytest.raises(ShardError, match=rf"{urls[0]}: .*more than the whole cache.*data.cache_gib"):
        ShardSet(urls, cache=cache_in(tmp_path / "cache", server, shards=0.5))


def test_many_threads_and_processes_download_once_within_the_bound(server, tmp_path):
    urls = shards_on(server)
    cache = cache_in(tmp_path / "cache", server, shards=7)
    files = [cache.look_up(url)[0] for url in urls]
    (tmp_path / "asked").write_bytes(pickle.dumps((cache, files)))
    code = (
        f"import pickle; c, f = pickle.load(open({str(tmp_path / 'asked')!r}, 'rb')); [c.fetch(x) for x in f]"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(cache.fetch, files * 4))
    assert [process.wait(60) for process in processes] == [0, 0]
    assert server.gets() == 6


def test_readers_that_push_each_other_out_all_finish_within_the_bound(server, tmp_path):
    urls = shards_on(server)
    cache = cache_in(tmp_path / "cache", server, shards=2)
    expected, most, done = read_all(ShardSet(sorted(server.folder.glob("*.tar")))), [0], threading.Event()

    def watch():
        while not done.is_set():
            with_partial = 0
            for path in cache.folder.glob("*"):
                if path.suffix in (".tar", ".partial") and not path.name.startswith("."):
                    try:
                        with_partial += path.stat().st_size
                    except FileNotFoundError:
                        pass
            # A file renamed between two looks may be seen twice.
            most[0] = max(most[0], with_partial)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(2) as pool:
        sets = [ShardSet(urls, cache=cache) for _ in range(2)]
        found = list(pool.map(read_all, sets))
    done.set()
    watcher.join()
    assert found == [expected, expected]
    assert most[0] <= 3 * 40960


def test_what_a_killed_process_left_is_taken_away(server, tmp_path):
    urls = shards_on(server, 2)
    cache = cache_in(tmp_path / "cache", server, shards=1)
    one, two = (cache.look_up(url)[0] for url in urls)
    cache.path(one).with_suffix(".partial").write_bytes(bytes(30000))
    assert cache.fetch(two)
    assert [path.name for path in cache.folder.glob("*.*") if path.suffix != ".idx"] == [cache.path(two).name]


def test_a_killed_download_is_taken_up_by_the_next(server, tmp_path):
    (url,) = shards_on(server, 1)
    cache = cache_in(tmp_path / "cache", server, shards=1, timeout_seconds=60)
    file = cache.look_up(url)[0]
    server.faults["/00000.tar"] = ["stall"]
    asked = tmp_path / "asked"
    asked.write_bytes(pickle.dumps((cache, file)))
    code = f"import pickle; c, f = pickle.load(open({str(asked)!r}, 'rb')); c.fetch(f)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not server.gets():
        assert process.poll() is None
        time.sleep(0.01)
    assert not cache.fetch(file, wait=False)  # somebody else is at it
    process.kill()
    process.wait()
    assert cache.path(file).with_suffix(".partial").exists()
    assert cache.fetch(file) and server.gets() == 2
    assert cache.path(file).read_bytes() == (server.folder / "00000.tar").read_bytes()


def test_a_new_version_is_another_shard(server, tmp_path):
    (url,) = shards_on(server, 1)
    cache = cache_in(tmp_path / "cache", server)
    shards = ShardSet([url], cache=cache)
    old = read_all(shards)
    path = server.folder / "00000.tar"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    assert read_all(ShardSet([url], cache=cache)) == old
    assert len(list(cache.folder.glob("*.tar"))) == 2
    for tar in cache.folder.glob("*.tar"):
        tar.unlink()
    shards.release()
    with pytest.raises(ShardError, match=rf"{url}: changed on the server since the run began"):
        read_all(shards)


@pytest.mark.parametrize("fault", [[503, 503], ["cut"] * 2])
def test_a_shard_that_cannot_be_had_is_named(server, tmp_path, fault):
    (url,) = shards_on(server, 1)
    cache = cache_in(tmp_path / "cache", server)
    shards = ShardSet([url], cache=cache)
    server.faults["/00000.tar"] = list(fault)
    with pytest.raises(ShardError, match=rf"{url}: 2 attempts failed"):
        read_all(shards)
    assert held(cache) == 0
    assert len(read_all(shards)) == 2  # the server has come back


def test_an_index_of_another_tar_is_refused(server, tmp_path):
    urls = shards_on(server, 2)
    (server.folder / "00001.idx").write_bytes((server.folder / "00000.idx").read_bytes())
    cache = cache_in(tmp_path / "cache", server)
    shards = ShardSet(urls, cache=cache)
    with pytest.raises(ShardError, match=r"00001\.tar: .*00001\.idx does not describe it; build"):
        read_all(shards)
    build_index(server.folder / "00001.tar")
    assert len(read_all(ShardSet(urls, cache=cache))) == 4


@pytest.mark.parametrize(
    "text, message", [("v1.1 1\n", "not a usable index"), ("v1.2 1\ntxt 512 99999 a.txt\n", "bytes beyond")]
)
def test_a_damaged_index_is_named(server, tmp_path, text, message):
    urls = shards_on(server, 1)
    (server.folder / "00000.idx").write_text(text)
    with pytest.raises(ShardError, match=rf"00000\.idx .*{message}"):
        ShardSet(urls, cache=cache_in(tmp_path / "cache", server))


def test_a_damaged_file_of_the_cache_is_named(server, tmp_path):
    urls = shards_on(server, 1)
    cache = cache_in(tmp_path / "cache", server)
    shards = ShardSet(urls, cache=cache)
    read_all(shards)
    shards.release()
    (tar,) = cache.folder.glob("*.tar")
    os.truncate(tar, 512)
    with pytest.raises(ShardError, match=rf"{tar}: 512 bytes, but {urls[0]} has 40960; delete it"):
        read_all(shards)
    tar.with_suffix(".idx").write_text("?")
    with pytest.raises(ShardError, match=r"\.idx, the index of .*delete it"):
        ShardSet(urls, cache=cache)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", malicious.SHARDS)
def test_malicious_remote_shards_are_refused_by_name(server, tmp_path, kind):
    build, message = malicious.SHARDS[kind]
    build(server.folder / "bad.tar")
    cache = cache_in(tmp_path / "cache", server, shards=100)
    with pytest.raises(ShardError, match=rf"(?s){server.url}/bad\.tar.*({message})"):
        ShardSet([f"{server.url}/bad.tar"], cache=cache)
    # Nor does an index that leaves the bad member out help.
    good = malicious.good(tmp_path / "good.tar")
    (server.folder / "bad.idx").write_bytes(build_index(good).read_bytes())
    os.truncate(server.folder / "bad.tar", max(10240, (server.folder / "bad.tar").stat().st_size))
    with pytest.raises(ShardError, match=rf"(?s){server.url}/bad\.tar"):
        ShardSet([f"{server.url}/bad.tar"], cache=cache)[0].read("txt")
    assert not [path for path in cache.folder.rglob("*") if path.suffix in (".tar", ".partial")]


def test_a_cache_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match="file/cache: .*another data.cache_folder"):
        cache_in(tmp_path / "file" / "cache", server)


def test_prefetching_is_in_order_and_leaves_what_is_wanted(server, tmp_path):
    urls = shards_on(server)
    cache = cache_in(tmp_path / "cache", server, shards=4)
    files = [cache.look_up(url)[0] for url in urls]
    server.faults["/00001.tar"] = [503]  # the second attempt has it
    prefetcher = Prefetcher(cache, 1)  # of two, the later shard may be the first to ask for room

    def wait_for(*numbers):
        end = time.monotonic() + 60
        while not all(cache.path(files[n]).exists() for n in numbers):
            assert time.monotonic() < end
            time.sleep(0.01)

    prefetcher.want(files[:5])  # one more than there is room for
    wait_for(0, 1, 2, 3)
    time.sleep(0.2)
    assert not cache.path(files[4]).exists() and server.gets() == 5
    prefetcher.want(files[2:6])
    wait_for(2, 3, 4, 5)
    assert server.gets() == 7 and held(cache) <= cache.bound_bytes
    prefetcher.close()
