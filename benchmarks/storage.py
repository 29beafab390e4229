"""Compare the speed of this project's verified transfers with that of bare boto3, on a local server.

    python benchmarks/storage.py              # 8 objects of 64 MiB, 5 repeats (2 of writing): some minutes
    python benchmarks/storage.py --objects 4 --megabytes 16 --repeats 3

The two alternate on the same server (moto's, in a separate process); only the ratios within one run are
meaningful. This project verifies checksums. boto3's `download_file` with its default TransferConfig verifies
no checksum if it transfers an object in several parts. Files are written to /dev/shm if it exists, so that
the disk is not measured.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))
BUCKET = "bench"


def start_server() -> subprocess.Popen:
    """Start an S3 server, and set the environment variables with which this process finds it."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    program = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return server
        except OSError:
            time.sleep(0.1)
    server.kill()
    sys.exit("the server does not start: check that moto[server] is installed")


def measure(methods: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each method in each repeat. The methods alternate, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        # The first method of a round warms caches for the second, so the order changes with each round.
        for name in sorted(methods, reverse=bool(repeat % 2)):
            started = time.perf_counter()
            methods[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(label: str, methods: dict[str, Callable[[], object]], repeats: int, megabytes: float) -> None:
    """Print the median speeds of `ours` and `bare`, and their ratio."""
    seconds = measure(methods, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [bare / ours for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True)]
    print(
        f"{label:34} ours {megabytes / medians['ours']:7.0f} MB/s   "
        f"boto3 {megabytes / medians['bare']:7.0f} MB/s   "
        f"ratio {medians['bare'] / medians['ours']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def main() -> None:
    """Upload objects, and measure each kind of transfer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=64, help="size of each object, in MiB")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    server = start_server()
    try:
        _run(options.objects, options.megabytes, options.repeats)
    finally:
        server.kill()
        server.wait()


def _run(count: int, megabytes: int, repeats: int) -> None:
    import boto3

    from slam_asr.storage import downloads, objects, uploads

    bare = boto3.session.Session().client("s3")
    bare.create_bucket(Bucket=BUCKET)
    names = [f"object-{i}" for i in range(count)]
    content = os.urandom(2**20) * megabytes
    for name in names:
        uploads.write(f"s3://{BUCKET}/{name}", content)
    total = count * megabytes * 2**20 / 1e6
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:

        def our_download(name: str) -> None:
            with open(f"{folder}/ours-{name}", "w+b") as file:
                downloads.download(f"s3://{BUCKET}/{name}", file)
            os.unlink(f"{folder}/ours-{name}")

        def bare_download(name: str) -> None:
            bare.download_file(BUCKET, name, f"{folder}/bare-{name}")
            os.unlink(f"{folder}/bare-{name}")

        def download_all(download: Callable[[str], None], threads: int) -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(download, names))

        print(
            f"{count} objects of {megabytes} MiB, {os.cpu_count()} cores, {repeats} repeats; "
            "ratio: our speed / boto3's speed (lowest and highest ratio of a single repeat)"
        )
        for threads in (1, 2, 4):
            methods = {
                "ours": lambda n=threads: download_all(our_download, n),
                "bare": lambda n=threads: download_all(bare_download, n),
            }
            compare(f"download to files, {threads} thread{'s' * (threads > 1)}", methods, repeats, total)
    compare(
        "read_bytes / get_object().read()",
        {
            "ours": lambda: [objects.read(f"s3://{BUCKET}/{n}") for n in names],
            "bare": lambda: [bare.get_object(Bucket=BUCKET, Key=n)["Body"].read() for n in names],
        },
        repeats,
        total,
    )
    compare(
        "write / put_object()",
        {
            "ours": lambda: [uploads.write(f"s3://{BUCKET}/{n}", content) for n in names],
            "bare": lambda: [bare.put_object(Bucket=BUCKET, Key=n, Body=content) for n in names],
        },
        max(repeats // 2, 1),
        total,
    )


if __name__ == "__main__":
    main()
