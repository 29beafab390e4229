"""A worker that does not end when it is asked to, like one that waits for a GPU's driver."""

import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ignores SIGTERM", flush=True)
time.sleep(600)
