"""Compare `slam-asr serve` with a plain loop of `generate`, or test it for minutes with misbehaving clients.

MODEL is a model folder or the name of a shipped model; FOLDER has recordings of at most 20 seconds:

    python benchmarks/serving.py MODEL FOLDER --concurrency 1 8 64 --requests 64
    python benchmarks/serving.py MODEL FOLDER --faster-whisper CTRANSLATE2_MODEL
    python benchmarks/serving.py MODEL FOLDER --soak 10

Each method gets the same recordings from the same number of clients. A client sends its next recording as
soon as it has an answer. The plain loop and faster-whisper run in this process, without HTTP. They process
one recording at a time, so clients wait for each other. The plain loop calls transformers' `generate` of the
same model, with the same beams and penalties, but without CTC's scores (`decoding.ctc_weight`). Prints
requests per second, the multiple of real time, the 50th and 95th percentile of the latency in seconds, and
the processor time per request of this process and the server together, in seconds. With OMP_NUM_THREADS=1,
other programs on the machine hardly affect the processor time.

With `--soak`, clients send recordings in several formats for that many minutes; some clients close their
connection early, and some files are cut. Each text is compared with that of the recording decoded alone, and
the memory of the server is printed.
"""

import argparse
import contextlib
import http.client
import io
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import soundfile
import torch

from slam_asr.audio import SAMPLE_RATE, read_clip
from slam_asr.decoding.transcriber import Transcriber, load_transcriber
from slam_asr.models.batch import Row, collate

FORMATS = {"wav": {}, "flac": {}, "ogg": {}, "mp3": {}, "opus": {"format": "OGG", "subtype": "OPUS"}}
"""Formats of the soak, with soundfile's options."""
Transcribe = Callable[[bytes], str]


def main() -> None:
    """Print a line per method and number of clients, or the result of the soak."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=64, help="requests per method and concurrency")
    parser.add_argument("--wait", default="0.02", help="limits.wait of the server")
    parser.add_argument("--faster-whisper", help="a Whisper that CTranslate2's converter wrote")
    parser.add_argument("--soak", type=float, help="minutes")
    options = parser.parse_args()
    files = sorted(p for p in Path(options.folder).rglob("*") if p.suffix in (".flac", ".wav"))
    random.Random(0).shuffle(files)
    contents = [file.read_bytes() for file in files[: max(8, options.requests)]]
    transcriber = load_transcriber(options.model)
    with serving(options.model, options.wait) as (address, process):
        if options.soak:
            soak(address, process, transcriber, contents, options.soak * 60)
            return
        methods = {
            "slam-asr serve": lambda content: post(address, content)[1],
            "loop of generate": one_at_a_time(lambda content: plain(transcriber, content)),
        }
        if options.faster_whisper:
            methods["faster-whisper"] = one_at_a_time(faster_whisper(options.faster_whisper))
        for transcribe in methods.values():
            transcribe(contents[0])
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
        for clients in options.concurrency:
            for name, transcribe in methods.items():
                both = [psutil.Process(), process]
                before = sum(sum(p.cpu_times()[:2]) for p in both)
                line = measure(clients, transcribe, contents, options.requests)
                used = (sum(sum(p.cpu_times()[:2]) for p in both) - before) / options.requests
                print(f"{clients:3} clients  {name:<18} {line}  {used:6.2f} s of processor", flush=True)


@contextlib.contextmanager
def serving(model: str, wait: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server; yield its address and process."""
    command = [sys.executable, "-m", "slam_asr", "serve", "--model", model, "--port", "0"]
    command += ["--limits.wait", wait, "--limits.requests", "128", "--limits.deadline", "3600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        address = ""
        for line in process.stdout:
            if line.startswith("listening"):
                address = line.split("//")[1].strip()
            if line.startswith("ready"):
                break
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()


def post(address: str, content: bytes, seconds: float = 3600) -> tuple[int, str]:
    """Send a recording; return the status, and the text or the message."""
    connection = http.client.HTTPConnection(address, timeout=seconds)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    try:
        connection.request(
            "POST",
            "/v1/audio/transcriptions",
            head + content + b"\r\n--b--\r\n",
            {"Content-Type": "multipart/form-data; boundary=b"},
        )
        answer = connection.getresponse()
        values = json.loads(answer.read())
        return answer.status, values["text"] if answer.status == 200 else values["error"]["message"]
    finally:
        connection.close()


def one_at_a_time(transcribe: Transcribe) -> Transcribe:
    """Let clients wait for each other, as for a server without batches."""
    lock = threading.Lock()

    def waiting(content: bytes) -> str:
        with lock:
            return transcribe(content)

    return waiting


def plain(transcriber: Transcriber, content: bytes) -> str:
    """Transcribe with transformers' `generate`, a segment at a time."""
    searcher, prompt, texts = transcriber._searcher, transcriber._searcher.prompt, []
    for piece in transcriber.pieces(read_clip("a", content=content).samples):
        audio = transcriber._prepare(piece.samples)
        batch = collate([Row(audio, piece.positions, prompt.main.before, prompt.main.ids, [])])
        with torch.inference_mode():
            batch = batch.to(searcher.model.llm.device)
            (ids,) = searcher.model.generate(batch, searcher.generation).sequences.tolist()
        texts.append(prompt.answer_of(ids))
    return " ".join(text for text in texts if text)


def faster_whisper(folder: str) -> Transcribe:
    """Load a Whisper for CTranslate2, in fp32 like the recipes of the shipped models."""
    from faster_whisper import WhisperModel

    model = WhisperModel(
        folder,
        device="cpu",
        compute_type="float32",
        cpu_threads=torch.get_num_threads(),
        local_files_only=True,
    )

    def transcribe(content: bytes) -> str:
        segments, _ = model.transcribe(io.BytesIO(content), language="en", beam_size=1)
        return " ".join(segment.text.strip() for segment in segments)

    return transcribe


def measure(clients: int, transcribe: Transcribe, contents: list[bytes], requests: int) -> str:
    """Return the throughput and the latencies of a method, as text."""
    sent = [contents[i % len(contents)] for i in range(requests)]
    audio = sum(soundfile.info(io.BytesIO(content)).duration for content in sent)

    def ask(content: bytes) -> float:
        started = time.perf_counter()
        transcribe(content)
        return time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = list(pool.map(ask, sent))
    seconds = time.perf_counter() - started
    median, percentile_95 = (statistics.quantiles(latencies, n=20, method="inclusive")[i] for i in (9, 18))
    rates = f"{requests / seconds:7.3f} requests/s  {audio / seconds:6.2f} x real time"
    return f"{rates}  p50 {median:7.2f} s  p95 {percentile_95:7.2f} s"


def soak(
    address: str, process: psutil.Process, transcriber: Transcriber, contents: list[bytes], seconds: float
) -> None:
    """Send random recordings from eight clients, and print what came back and the memory of the server."""
    recordings = [(content, alone(transcriber, content)) for content in in_alternating_formats(contents)]
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            content, (text, is_close) = draw.choice(recordings)
            counts[send(address, draw, content, text, is_close)] += 1

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(client, seed) for seed in range(8)]
        while not all(future.done() for future in running):
            time.sleep(min(30.0, seconds / 10))
            memory = process.memory_full_info()
            line = f"{memory.uss / 1e6:6.0f} MB, {process.num_fds()} files, {process.num_threads()} threads"
            print(f"{seconds - (end - time.monotonic()):5.0f} s  {line}  {dict(counts)}", flush=True)
        for future in running:
            future.result()
    assert not counts["wrong"], counts


def in_alternating_formats(contents: list[bytes]) -> Iterator[bytes]:
    """Yield each recording in one of `FORMATS`, which take turns."""
    for content, (suffix, options) in zip(contents, list(FORMATS.items()) * len(contents), strict=False):
        buffer = io.BytesIO()
        samples = read_clip("a", content=content).samples
        soundfile.write(buffer, samples, SAMPLE_RATE, **({"format": suffix.upper()} | options))
        yield buffer.getvalue()


def alone(transcriber: Transcriber, content: bytes) -> tuple[str, bool]:
    """Return the text of a recording that is decoded alone, and whether rounding may have decided it."""
    answers = [
        transcriber.decode([piece])[0]
        for piece in transcriber.pieces(read_clip("a", content=content).samples)
    ]
    return " ".join(a.text for a in answers if a.text), any(a.close for a in answers)


def send(address: str, draw: random.Random, content: bytes, text: str, is_close: bool) -> str:
    """Send a recording, sometimes cut or without waiting for the answer; return what happened."""
    kind = draw.random()
    if kind < 0.15:
        status, _ = post(address, content[: len(content) // 2])
        # Half of an mp3 file without a count of its frames may be a complete file of half the length.
        return "cut file refused" if status == 400 else f"cut file: {status}"
    if kind < 0.3:
        with contextlib.suppress(TimeoutError):
            post(address, content, draw.uniform(0.01, 1))
            return "answered before the client left"
        return "client left"
    status, answer = post(address, content)
    if status != 200:
        return f"status {status}"
    return "right" if answer == text else "close call" if is_close else "wrong"


if __name__ == "__main__":
    main()
