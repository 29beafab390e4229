"""A batch takes a piece of each waiting request in turn, as many as the limit on LLM positions allows."""

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
from fastapi.testclient import TestClient

from slam_asr.artifacts.transcript import Piece
from slam_asr.config.recipe import Decoding
from slam_asr.models.searcher import Answer
from slam_asr.serving.app import build_app
from slam_asr.serving.batcher import Batcher, DecodingError, Job
from slam_asr.serving.limits import Limits, Refusal
from slam_asr.serving.metrics import Metrics
from slam_asr.serving.service import Served, Service


class Slow:
    """A recognizer that decodes nothing until `go` is set. A text contains the start of its piece."""

    def __init__(self, budget: int, beams: int = 1) -> None:
        self.options = Decoding(beams=beams, max_new_tokens=10, positions_per_batch=budget)
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def pieces(self, samples):
        raise AssertionError("the tests make the pieces")

    def positions(self, piece: Piece) -> int:
        return piece.positions

    def decode(self, pieces):
        self.go.wait(10)
        self.batches.append([int(p.start) for p in pieces])
        if any(p.start == 666 for p in pieces):
            raise MemoryError("this piece is too much")
        return [Answer(f"text {p.start:g}", False, [], close=p.start == 7) for p in pieces]


def pieces(*starts: float, positions: int = 10) -> list[Piece]:
    return [Piece(np.zeros(0, np.float32), start, start + 1, positions) for start in starts]


def run(recognizer: Slow, use: Callable[[Batcher], object], wait: float = 0.0) -> Metrics:
    metrics, loaded = Metrics(), threading.Event()
    batcher = Batcher(lambda: recognizer, wait, metrics, lambda error: loaded.set())
    batcher.start()
    assert loaded.wait(10)
    try:
        asyncio.run(asyncio.wait_for(use(batcher), 10))
    finally:
        recognizer.go.set()
        batcher.close()
    assert not batcher.alive
    return metrics


async def taken(job: Job) -> None:
    while job.taken == 0:
        await asyncio.sleep(0.001)


async def texts(job: Job) -> list[str]:
    return [answer.text async for answer in job.answers()]


def sample(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(name)


def test_a_long_recording_does_not_delay_short_ones_and_answers_stay_in_order():
    slow = Slow(budget=80)  # four pieces of 10 + 10 positions

    async def use(batcher):
        first = batcher.submit(pieces(0))
        await taken(first)
        jobs = [
            batcher.submit(pieces(*range(10, 16))),
            batcher.submit(pieces(20)),
            batcher.submit(pieces(30)),
        ]
        slow.go.set()
        assert await asyncio.gather(*map(texts, jobs)) == [
            [f"text {n}" for n in range(10, 16)],
            ["text 20"],
            ["text 30"],
        ]

    metrics = run(slow, use)
    assert slow.batches == [[0], [10, 20, 30, 11], [12, 13, 14, 15]]
    assert sample(metrics, "slam_asr_batch_segments_sum") == 9
    assert sample(metrics, "slam_asr_segments_waiting") == 0


def test_batches_are_limited_by_positions_with_padding_and_beams():
    slow = Slow(budget=300, beams=2)

    async def use(batcher):
        first = batcher.submit(pieces(0))
        await taken(first)
        lengths = {1: 20, 2: 30, 3: 40, 4: 40, 5: 500, 6: 1}
        jobs = [batcher.submit(pieces(n, positions=length)) for n, length in lengths.items()]
        slow.go.set()
        await asyncio.gather(*map(texts, jobs))

    run(slow, use)
    # The first three pieces, padded to the 50 positions of the longest, fill the budget: 3 · 50 · 2 beams.
    # The fifth piece has 510 positions, more than the budget, and is decoded alone.
    assert slow.batches == [[0], [1, 2, 3], [4], [5], [6]]


def test_a_batch_waits_for_more_requests_unless_it_is_full():
    slow = Slow(budget=60)
    slow.go.set()

    async def use(batcher):
        first = batcher.submit(pieces(1))
        await asyncio.sleep(0.1)
        others = [batcher.submit(pieces(n)) for n in (2, 3)]  # these fill the batch long before its wait ends
        await asyncio.wait_for(asyncio.gather(texts(first), *map(texts, others)), 1)
        started = asyncio.get_running_loop().time()
        await texts(batcher.submit(pieces(4)))
        assert asyncio.get_running_loop().time() - started > 1.4

    run(slow, use, wait=1.5)
    assert slow.batches == [[1, 2, 3], [4]]


def test_pieces_of_a_cancelled_request_are_not_decoded():
    slow = Slow(budget=20)

    async def use(batcher):
        first = batcher.submit(pieces(0))
        await taken(first)
        gone, other = batcher.submit(pieces(1, 2)), batcher.submit(pieces(3))
        batcher.cancel(gone)
        slow.go.set()
        assert await texts(other) == ["text 3"]

    run(slow, use)
    assert slow.batches == [[0], [3]]


def test_a_piece_on_which_the_model_fails_ends_only_its_own_request():
    slow = Slow(budget=1000)

    async def use(batcher):
        first = batcher.submit(pieces(0))
        await taken(first)
        bad, *good = (batcher.submit(pieces(n)) for n in (666, 1, 2, 7))
        slow.go.set()
        assert await asyncio.gather(*map(texts, good)) == [["text 1"], ["text 2"], ["text 7"]]
        with pytest.raises(DecodingError) as raised:
            await texts(bad)
        assert isinstance(raised.value.__cause__, MemoryError)
        assert await texts(batcher.submit(pieces(8))) == ["text 8"], "the thread still works"

    metrics = run(slow, use)
    assert sample(metrics, "slam_asr_close_calls_total") == 1


def test_silence_is_answered_at_once():
    slow = Slow(budget=100)
    slow.go.set()

    async def use(batcher):
        assert await texts(batcher.submit([])) == []
        assert await texts(batcher.submit(pieces(1))) == ["text 1"], "the thread still works"

    run(slow, use)
    assert slow.batches == [[1]]


def test_a_server_whose_decoding_thread_has_ended_does_not_ask_clients_to_try_again():
    loaded = threading.Event()
    service = Service(
        Served(lambda: Slow(100), ["m"], 0, "", [], Limits(), None), on_loaded=lambda error: loaded.set()
    )
    service.batcher.start()
    assert loaded.wait(10)
    client = TestClient(build_app(service))
    assert client.get("/ready").json() == {"status": "ready"}
    service.close()
    assert [client.get(path).json()["status"] for path in ("/ready", "/health")] == ["failed", "failed"]
    with pytest.raises(Refusal, match="has failed and has to be restarted"):
        service.admit()
