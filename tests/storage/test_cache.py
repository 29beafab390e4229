"""Processes that share a cache fetch each object once, never exceed its limit, and lose no file in use."""

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from slam_asr.errors import UserError
from slam_asr.storage import cache as cache_module
from slam_asr.storage.cache import CacheFull, DiskCache

fork = multiprocessing.get_context("fork")


def content_of(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def fill_with(content: bytes, log=None, pause: float = 0.0):
    """Return a function that writes `content` in two halves, and then adds a line to the file `log`."""

    def fill(file):
        file.write(content[: len(content) // 2])
        file.flush()
        time.sleep(pause)
        file.write(content[len(content) // 2 :])
        if log is not None:
            with open(log, "a", encoding="utf-8") as lines:
                lines.write("filled\n")

    return fill


def hold(cache: DiskCache, name: str, size: int = 1000):
    return cache.hold(name, size, fill_with(content_of(name, size)))


def names(folder) -> list[str]:
    """Return the names of all files in a cache, with temporary ones, but without its locks."""
    return sorted(f.name for f in folder.iterdir() if f.name != ".locks")


def test_each_object_is_fetched_once_by_many_processes(tmp_path):
    def fetch_all(seed: int) -> None:
        cache = DiskCache(tmp_path / "cache", 10**6)
        order = list(range(5))
        random.Random(seed).shuffle(order)
        for i in order:
            held = cache.hold(
                f"o{i}", 1000 + i, fill_with(content_of(str(i), 1000 + i), tmp_path / f"log-{i}", 0.05)
            )
            assert Path(held.name).read_bytes() == content_of(str(i), 1000 + i)
            held.close()

    assert run_all(fetch_all, 6) == [0] * 6
    assert [(tmp_path / f"log-{i}").read_text() for i in range(5)] == ["filled\n"] * 5
    assert (
        names(tmp_path / "cache") == [f"o{i}" for i in range(5)]
        and os.listdir(tmp_path / "cache" / ".locks") == []
    )


def run_all(target, count: int) -> list[int]:
    """Run several processes and return their exit codes."""
    processes = [fork.Process(target=target, args=(i,)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [p.exitcode for p in processes]


def test_the_limit_is_never_exceeded_and_held_files_remain(tmp_path):
    limit, size = 5000, 1000

    def hold_some(seed: int) -> None:
        cache, chance = DiskCache(tmp_path / "cache", limit), random.Random(seed)
        for _ in range(60):
            name = f"o{chance.randrange(12)}"
            try:
                held = cache.hold(name, size, fill_with(content_of(name, size), pause=0.001))
            except CacheFull:
                continue
            time.sleep(0.002)
            # The file is read by its name, so it must still exist.
            assert Path(held.name).read_bytes() == content_of(name, size)
            held.close()

    largest, done = [0], threading.Event()
    (tmp_path / "cache" / ".locks").mkdir(parents=True)

    def watch() -> None:
        while not done.is_set():
            # The lock keeps the folder unchanged while its sizes are added up.
            # Inodes ensure that a file with two names is counted once.
            with DiskCache(tmp_path / "cache", limit)._locked(cache_module._CAPACITY_LOCK):
                files = {}
                for file in (tmp_path / "cache").iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        status = file.stat()
                        files[status.st_ino] = status.st_size if file.is_file() else 0
                largest[0] = max(largest[0], sum(files.values()))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert run_all(hold_some, 4) == [0] * 4
    finally:
        done.set()
        watcher.join()
    # The lower bound shows that the cache was full, so that exceeding the limit would have been noticed.
    assert limit - size <= largest[0] <= limit


def test_the_least_recently_used_file_is_removed_first(tmp_path):
    cache = DiskCache(tmp_path, 3000)
    for name in "abc":
        hold(cache, name).close()
    hold(cache, "a").close()
    hold(cache, "d").close()
    assert names(tmp_path) == ["a", "c", "d"]
    hold(cache, "c").close()
    hold(cache, "e", 1500).close()
    assert names(tmp_path) == ["c", "e"]


def test_held_files_are_not_removed_for_an_object_that_does_not_fit(tmp_path):
    cache = DiskCache(tmp_path, 3000)
    held = [hold(cache, name) for name in "abc"]
    with pytest.raises(CacheFull, match="in use"):
        hold(cache, "d")
    assert names(tmp_path) == ["a", "b", "c"]
    with pytest.raises(CacheFull):
        hold(cache, "e", 3001)
    held[1].close()
    hold(cache, "d").close()
    assert names(tmp_path) == ["a", "c", "d"]


def test_a_killed_process_leaves_no_locks_and_no_files_that_cannot_be_removed(tmp_path):
    cache = DiskCache(tmp_path, 3000)

    def hold_one_and_fetch_another() -> None:
        hold(cache, "held")
        cache.hold(
            "half",
            1000,
            lambda file: (
                file.write(b"x"),
                file.flush(),
                (tmp_path / ".locks" / "ready").touch(),
                time.sleep(60),
            ),
        )

    process = fork.Process(target=hold_one_and_fetch_another)
    process.start()
    while not (tmp_path / ".locks" / "ready").exists():
        time.sleep(0.01)
    (tmp_path / ".locks" / "ready").unlink()
    assert names(tmp_path) == [".half.partial", "held"]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # All three fit only if both files of the killed process are removed.
    for name in "abc":
        hold(cache, name).close()
    assert names(tmp_path) == ["a", "b", "c"]
    held = hold(cache, "half")
    assert Path(held.name).read_bytes() == content_of("half", 1000)
    assert os.listdir(tmp_path / ".locks") == []


def test_an_object_that_a_killed_process_half_fetched_is_fetched_by_the_waiting_process(tmp_path):
    cache = DiskCache(tmp_path, 3000)
    process = fork.Process(
        target=lambda: cache.hold(
            "x", 1000, lambda file: ((tmp_path / ".locks" / "ready").touch(), time.sleep(60))
        )
    )
    process.start()
    while not (tmp_path / ".locks" / "ready").exists():
        time.sleep(0.01)
    contents = []
    waiter = threading.Thread(target=lambda: contents.append(Path(hold(cache, "x").name).read_bytes()))
    waiter.start()
    time.sleep(0.1)
    assert not contents
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiter.join(10)
    assert contents == [content_of("x", 1000)]


def test_an_object_may_have_the_name_of_a_lock(tmp_path):
    cache, name = DiskCache(tmp_path, 3000), cache_module._CAPACITY_LOCK
    assert Path(hold(cache, name).name).read_bytes() == content_of(name, 1000)


@pytest.mark.parametrize(
    "failure", [UserError("no"), ValueError("no"), PermissionError(errno.EACCES, "no"), KeyboardInterrupt()]
)
def test_a_failed_fetch_leaves_no_files_and_its_error_is_raised_unchanged(tmp_path, failure):
    cache = DiskCache(tmp_path, 3000)

    def fill(file):
        file.write(b"half")
        raise failure

    with pytest.raises(type(failure)):
        cache.hold("x", 1000, fill)
    assert names(tmp_path) == [] and os.listdir(tmp_path / ".locks") == []
    hold(cache, "x").close()


@pytest.mark.parametrize("size", [999, 1001])
def test_an_object_of_another_size_is_refused(tmp_path, size):
    with pytest.raises(UserError, match="damaged"):
        DiskCache(tmp_path, 3000).hold(
            "x", 1000, lambda file: (file.seek(0), file.truncate(), file.write(b"x" * size))
        )
    assert names(tmp_path) == []


def test_an_empty_object_can_be_held(tmp_path):
    assert Path(hold(DiskCache(tmp_path, 10), "x", 0).name).read_bytes() == b""


def fail_with_full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_removes_unused_files_and_is_reported_if_none_is_left(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 10**6)
    for name in "ab":
        hold(cache, name).close()
    real = os.posix_fallocate
    monkeypatch.setattr(
        cache_module.os,
        "posix_fallocate",
        lambda *a: fail_with_full_disk() if (tmp_path / "a").exists() else real(*a),
    )
    hold(cache, "c").close()
    assert names(tmp_path) == ["b", "c"]
    held = [hold(cache, name) for name in "bc"]
    monkeypatch.setattr(cache_module.os, "posix_fallocate", fail_with_full_disk)
    with pytest.raises(CacheFull, match="No space left"):
        hold(cache, "d")
    assert names(tmp_path) == ["b", "c"] and os.listdir(tmp_path / ".locks") == []
    del held


def test_a_disk_that_fills_up_while_fetching_is_reported(tmp_path):
    with pytest.raises(CacheFull):
        DiskCache(tmp_path, 10**6).hold("x", 1000, fail_with_full_disk)
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of one megabyte."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk and fill it")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_disk_smaller_than_the_limit_is_used_up_to_its_size(small_disk):
    cache = DiskCache(small_disk / "cache", 10**9)
    held = hold(cache, "a", 400_000)
    for name in "bcd":
        assert Path(hold(cache, name, 400_000).name).read_bytes() == content_of(name, 400_000)
    with pytest.raises(CacheFull):
        hold(cache, "e", 900_000)
    assert Path(held.name).read_bytes() == content_of("a", 400_000)
    assert not [n for n in names(small_disk / "cache") if n.startswith(".")]


def test_a_process_that_is_forked_during_a_fetch_does_not_hold_the_lock(tmp_path):
    cache, filling, resume = DiskCache(tmp_path, 3000), threading.Event(), threading.Event()

    def fill(file):
        filling.set()
        resume.wait(10)
        file.write(content_of("x", 1000))

    filler = threading.Thread(target=lambda: cache.hold("x", 1000, fill).close())
    filler.start()
    filling.wait(10)
    held = []
    waiter = threading.Thread(target=lambda: held.append(hold(cache, "x")), daemon=True)
    waiter.start()
    time.sleep(0.2)
    process = fork.Process(target=time.sleep, args=(30,))
    process.start()
    resume.set()
    waiter.join(3)
    in_time = len(held)
    process.kill()
    process.join()
    filler.join(10)
    assert in_time == 1
