"""Variables that Python and glibc read only when a program starts: for UTF-8, and for huge pages.

A program that lacks one of them starts itself again with it, before large libraries are imported. Child
processes inherit the variables.

*UTF-8.* Files are opened with `encoding="utf-8"`. But arguments, names of files and standard output follow
the locale: under `en_US.ISO-8859-1`, the prompt `français` on a UTF-8 command line would arrive as
`franÃ§ais`, and Chinese text could not be printed. Python's UTF-8 mode changes that.

*Huge pages.* On a CPU, a training step requests and returns gigabytes of memory, and the kernel has to supply
each page of it. Pages of 2 MiB instead of 4 KiB are 512 times fewer. How much time that saves depends on the
machine: docs/measurements/speed.md has figures.
"""

import os
import sys
from pathlib import Path

UTF8_MODE = "PYTHONUTF8"
"""Python's environment variable for its UTF-8 mode."""
TUNABLES = "GLIBC_TUNABLES"
"""glibc's environment variable with settings, separated by colons. Other C libraries ignore it."""
HUGE_PAGES = "glibc.malloc.hugetlb"
"""Setting of glibc 2.35 and later: 1 requests huge pages for the memory that malloc returns; 0 does not."""
_KERNELS_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prepare_environment() -> None:
    """Start this program again if it lacks Python's UTF-8 mode or huge pages.

    The locale may have another encoding than UTF-8, or none, as in a container. If the user has set
    `PYTHONUTF8` or glibc's setting of huge pages, that value remains. If standard output is still not UTF-8,
    for whatever reason, it escapes the characters that it cannot encode.
    """
    missing = huge_pages()
    if sys.getfilesystemencoding() != "utf-8" and UTF8_MODE not in os.environ:
        missing[UTF8_MODE] = "1"
    if missing:
        os.environ.update(missing)
        # Not `sys.orig_argv`: glibc decodes some GBK bytes to characters that Python's GBK cannot encode.
        _, *arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
        os.execv(sys.executable, [os.fsencode(sys.executable), *arguments])
    if sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # it is a TextIOWrapper


def huge_pages() -> dict[str, str]:
    """Return the variable with which malloc requests huge pages; empty if it is set or has no effect."""
    given = os.environ.get(TUNABLES, "")
    if HUGE_PAGES in given:
        return {}
    try:
        # `always` gives huge pages even without a request; `never` gives none even with one.
        on_request = "[madvise]" in _KERNELS_MODE.read_text(encoding="ascii")
    except OSError:
        on_request = False
    return {TUNABLES: ":".join(filter(None, (given, f"{HUGE_PAGES}=1")))} if on_request else {}
