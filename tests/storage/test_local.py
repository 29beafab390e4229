"""Local files are written completely or not at all, and a full disk is reported in one sentence."""

import os
import resource
import subprocess
import sys

import pytest

from slam_asr.errors import UserError
from slam_asr.storage import digest, local_path, write_atomically


def test_a_failed_write_leaves_the_previous_file_and_no_temporary_file(tmp_path):
    target = tmp_path / "file"
    write_atomically(target, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="file"):
            write_atomically(target, "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_reported_in_one_sentence_with_exit_code_2():
    program = (
        "from slam_asr.errors import exit_on_user_error\n"
        "with exit_on_user_error():\n    f = open('/dev/full', 'w', buffering=1)\n    f.write('x\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("slam-asr: error: The disk is full") and done.stderr.count("\n") == 1


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_the_error_names_an_unsupported_scheme():
    with pytest.raises(UserError, match="ftp://"):
        local_path("ftp://host/file")
    assert str(local_path("file:///a/b")) == "/a/b"
