"""A worker that ignores SIGTERM, like a process that waits for a GPU's driver."""

import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ignores SIGTERM", flush=True)
time.sleep(600)
