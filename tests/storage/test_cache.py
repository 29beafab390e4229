"""Processes that share a cache fetch each object once, never exceed the bound, and lose nothing that is in use."""

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time

import pytest

from slam_asr.errors import UserError
from slam_asr.storage import cache as cache_module
from slam_asr.storage.cache import DiskCache, NoRoom

fork = multiprocessing.get_context("fork")


def content_of(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def fill_with(content: bytes, log=None, pause: float = 0.0):
    """Writes content; leaves a line in a file for each time that it did."""

    def fill(file):
        file.write(content[: len(content) // 2])
        file.flush()
        time.sleep(pause)
        file.write(content[len(content) // 2 :])
        if log is not None:
            with open(log, "a") as lines:
                lines.write("filled\n")

    return fill


def hold(cache: DiskCache, name: str, size: int = 1000):
    return cache.hold(name, size, fill_with(content_of(name, size)))


def names(folder) -> list[str]:
    """All that lies in a cache, but for the folder of locks."""
    return sorted(f.name for f in folder.iterdir() if f.name != ".locks")


def test_each_object_is_fetched_once_by_many_processes(tmp_path):
    def work(seed: int) -> None:
        cache = DiskCache(tmp_path / "cache", 10**6)
        order = list(range(5))
        random.Random(seed).shuffle(order)
        for i in order:
            held = cache.hold(
                f"o{i}", 1000 + i, fill_with(content_of(str(i), 1000 + i), tmp_path / f"log-{i}", 0.05)
            )
            assert held.path.read_bytes() == content_of(str(i), 1000 + i)
            held.release()

    assert run_all(work, 6) == [0] * 6
    assert [(tmp_path / f"log-{i}").read_text() for i in range(5)] == ["filled\n"] * 5
    assert (
        names(tmp_path / "cache") == [f"o{i}" for i in range(5)]
        and os.listdir(tmp_path / "cache" / ".locks") == []
    )


def run_all(work, count: int) -> list[int]:
    processes = [fork.Process(target=work, args=(i,)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [p.exitcode for p in processes]


def test_the_bound_holds_at_every_moment_and_what_is_held_stays(tmp_path):
    limit, size = 5000, 1000

    def work(seed: int) -> None:
        cache, chance = DiskCache(tmp_path / "cache", limit), random.Random(seed)
        for _ in range(60):
            name = f"o{chance.randrange(12)}"
            try:
                held = cache.hold(name, size, fill_with(content_of(name, size), pause=0.001))
            except NoRoom:
                continue
            time.sleep(0.002)
            # By its name: it is still there.
            assert held.path.read_bytes() == content_of(name, size)
            held.release()

    most, done = [0], threading.Event()
    (tmp_path / "cache" / ".locks").mkdir(parents=True)

    def watch() -> None:
        while not done.is_set():
            # While a listing is read the folder changes, and a sum over two moments means nothing: nobody makes
            # room meanwhile, and a file that got its name is counted once.
            with DiskCache(tmp_path / "cache", limit)._locked("room"):
                files = {}
                for file in (tmp_path / "cache").iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        status = file.stat()
                        files[status.st_ino] = status.st_size if file.is_file() else 0
                most[0] = max(most[0], sum(files.values()))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert run_all(work, 4) == [0] * 4
    finally:
        done.set()
        watcher.join()
    # So many that it shows when it is exceeded.
    assert limit - size <= most[0] <= limit


def test_the_least_recently_used_goes_first(tmp_path):
    cache = DiskCache(tmp_path, 3000)
    for name in "abc":
        hold(cache, name).release()
    hold(cache, "a").release()
    hold(cache, "d").release()
    assert names(tmp_path) == ["a", "c", "d"]
    hold(cache, "c").release()
    hold(cache, "e", 1500).release()
    assert names(tmp_path) == ["c", "e"]


def test_what_is_held_is_not_removed_for_what_does_not_fit(tmp_path):
    cache = DiskCache(tmp_path, 3000)
    held = [hold(cache, name) for name in "abc"]
    with pytest.raises(NoRoom, match="in use"):
        hold(cache, "d")
    assert names(tmp_path) == ["a", "b", "c"]
    with pytest.raises(NoRoom):
        hold(cache, "e", 3001)
    held[1].release()
    hold(cache, "d").release()
    assert names(tmp_path) == ["a", "c", "d"]


def test_a_killed_process_blocks_nobody_and_leaves_nothing(tmp_path):
    cache = DiskCache(tmp_path, 3000)

    def work() -> None:
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

    process = fork.Process(target=work)
    process.start()
    while not (tmp_path / ".locks" / "ready").exists():
        time.sleep(0.01)
    (tmp_path / ".locks" / "ready").unlink()
    assert names(tmp_path) == [".half.partial", "held"]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # Room for all three only where both go that the process had.
    for name in "abc":
        hold(cache, name).release()
    assert names(tmp_path) == ["a", "b", "c"]
    held = hold(cache, "half")
    assert held.path.read_bytes() == content_of("half", 1000)
    assert os.listdir(tmp_path / ".locks") == []


def test_a_killed_process_half_object_is_fetched_by_the_one_that_waits(tmp_path):
    cache = DiskCache(tmp_path, 3000)
    process = fork.Process(
        target=lambda: cache.hold(
            "x", 1000, lambda file: ((tmp_path / ".locks" / "ready").touch(), time.sleep(60))
        )
    )
    process.start()
    while not (tmp_path / ".locks" / "ready").exists():
        time.sleep(0.01)
    found = []
    waiter = threading.Thread(target=lambda: found.append(hold(cache, "x").path.read_bytes()))
    waiter.start()
    time.sleep(0.1)
    assert not found
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiter.join(10)
    assert found == [content_of("x", 1000)]


def test_an_object_named_as_a_lock_is_no_lock(tmp_path):
    cache = DiskCache(tmp_path, 3000)
    assert hold(cache, "room").path.read_bytes() == content_of("room", 1000)


@pytest.mark.parametrize(
    "failure", [UserError("no"), ValueError("no"), PermissionError(errno.EACCES, "no"), KeyboardInterrupt()]
)
def test_a_fill_that_raises_leaves_nothing_and_is_told_as_it_is(tmp_path, failure):
    cache = DiskCache(tmp_path, 3000)

    def fill(file):
        file.write(b"half")
        raise failure

    with pytest.raises(type(failure)):
        cache.hold("x", 1000, fill)
    assert names(tmp_path) == [] and os.listdir(tmp_path / ".locks") == []
    hold(cache, "x").release()


@pytest.mark.parametrize("size", [999, 1001])
def test_an_object_of_another_size_is_refused(tmp_path, size):
    with pytest.raises(UserError, match="damaged"):
        DiskCache(tmp_path, 3000).hold(
            "x", 1000, lambda file: (file.seek(0), file.truncate(), file.write(b"x" * size))
        )
    assert names(tmp_path) == []


def test_an_empty_object_is_held(tmp_path):
    assert hold(DiskCache(tmp_path, 10), "x", 0).path.read_bytes() == b""


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_makes_room_of_what_is_not_in_use_and_else_is_told(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 10**6)
    for name in "ab":
        hold(cache, name).release()
    real = os.posix_fallocate
    monkeypatch.setattr(
        cache_module.os, "posix_fallocate", lambda *a: full() if (tmp_path / "a").exists() else real(*a)
    )
    hold(cache, "c").release()
    assert names(tmp_path) == ["b", "c"]
    held = [hold(cache, name) for name in "bc"]
    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    with pytest.raises(NoRoom, match="No space left"):
        hold(cache, "d")
    assert names(tmp_path) == ["b", "c"] and os.listdir(tmp_path / ".locks") == []
    del held


def test_a_disk_that_fills_up_while_fetching_is_told(tmp_path):
    with pytest.raises(NoRoom):
        DiskCache(tmp_path, 10**6).hold("x", 1000, full)
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a megabyte."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk (root), to fill it up")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_disk_that_is_smaller_than_the_bound_serves_as_far_as_it_goes(small_disk):
    cache = DiskCache(small_disk / "cache", 10**9)
    held = hold(cache, "a", 400_000)
    for name in "bcd":
        assert hold(cache, name, 400_000).path.read_bytes() == content_of(name, 400_000)
    with pytest.raises(NoRoom):
        hold(cache, "e", 900_000)
    assert held.path.read_bytes() == content_of("a", 400_000)
    assert not [n for n in names(small_disk / "cache") if n.startswith(".")]


def test_a_process_that_is_forked_meanwhile_keeps_no_lock(tmp_path):
    cache, filling, go_on = DiskCache(tmp_path, 3000), threading.Event(), threading.Event()

    def fill(file):
        filling.set()
        go_on.wait(10)
        file.write(content_of("x", 1000))

    filler = threading.Thread(target=lambda: cache.hold("x", 1000, fill).release())
    filler.start()
    filling.wait(10)
    found = []
    waiter = threading.Thread(target=lambda: found.append(hold(cache, "x")), daemon=True)
    waiter.start()
    time.sleep(0.2)
    process = fork.Process(target=time.sleep, args=(30,))
    process.start()
    go_on.set()
    waiter.join(3)
    in_time = len(found)
    process.kill()
    process.join()
    filler.join(10)
    assert in_time == 1
