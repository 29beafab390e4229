"""Makes all text UTF-8, whatever the locale says: command-line arguments, names of files, and output.

Files are opened with `encoding="utf-8"`. But arguments, names of files and standard output follow the locale:
under `en_US.ISO-8859-1`, the prompt `français` on a UTF-8 command line would arrive as `franÃ§ais`, and
Chinese text could not be printed. Python's UTF-8 mode changes that, but it must be on when a process starts.
"""

import os
import sys
from pathlib import Path

UTF8_MODE = "PYTHONUTF8"
"""Python's environment variable for its UTF-8 mode. Child processes inherit it."""


def ensure_utf8() -> None:
    """Start this program again in Python's UTF-8 mode if the locale has another encoding.

    If the user has set `PYTHONUTF8`, the program is not started again. If standard output is still not UTF-8,
    for whatever reason, it escapes the characters that it cannot encode.
    """
    if sys.getfilesystemencoding() != "utf-8" and UTF8_MODE not in os.environ:
        os.environ[UTF8_MODE] = "1"
        # Not `sys.orig_argv`: glibc's GBK decodes bytes that Python's GBK cannot encode again.
        _, *arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
        os.execv(sys.executable, [os.fsencode(sys.executable), *arguments])
    if sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # it is a TextIOWrapper
