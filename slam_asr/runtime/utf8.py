"""Text is UTF-8 whatever the locale says: files, arguments of the command line, and output.

Files are opened with their encoding. Arguments, names of files and standard output follow the locale instead:
under `en_US.ISO-8859-1`, the prompt `français` on a UTF-8 command line would arrive as `franÃ§ais`, and
Chinese text could not be printed. Python's UTF-8 mode changes that, but only from the start of a process.
"""

import os
import sys
from pathlib import Path

UTF8_MODE = "PYTHONUTF8"
"""Python's environment variable. Child processes inherit it."""


def ensure_utf8() -> None:
    """Start this program again in Python's UTF-8 mode if the locale has another encoding.

    If the user has set `PYTHONUTF8`, that decides. Standard output then escapes what it cannot encode.
    """
    if sys.getfilesystemencoding() != "utf-8" and UTF8_MODE not in os.environ:
        os.environ[UTF8_MODE] = "1"
        # Not `sys.orig_argv`: glibc's GBK decodes bytes that Python's GBK cannot encode again.
        _, *arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
        os.execv(sys.executable, [os.fsencode(sys.executable), *arguments])
    if sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # it is a TextIOWrapper
