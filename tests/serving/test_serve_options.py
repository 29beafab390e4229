"""Before it loads weights, `slam-asr serve` refuses options that cannot work. The error is one sentence."""

import importlib.util
import re
import socket

import pytest

from slam_asr.cli import main
from slam_asr.errors import ModelError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "--port is 99999 but must be from 0 to 65535"),
        (["--port", "{taken}"], r"127\.0\.0\.1, port \d+, cannot be used"),
        (["--host", "nowhere.invalid"], "nowhere.invalid, port 8000, cannot be used"),
        (["--api-key-file", "{folder}/none"], "cannot be read: name a readable text file"),
        (["--api-key-file", "{folder}/empty"], "has no key: write one"),
        (["--limits.requests", "0"], "limits.requests is 0 but must be at least 1"),
        (["--limits.wait", "-1"], "limits.wait is -1.0 but must be at least 0"),
        (["--training.max_steps", "5"], "has no effect on a model that is already trained"),
    ],
)
def test_wrong_options_are_refused_before_weights_are_loaded(
    model, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr("slam_asr.decoding.model.Model.load", None)
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        values = {"taken": taken.getsockname()[1], "folder": tmp_path}
        main(["serve", model, *(word.format(**values) for word in options)])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and re.search(message, printed.err) and "Traceback" not in printed.err


def test_a_missing_extra_is_named_with_the_command_that_installs_it(model, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else found(name, *a)
    )
    with pytest.raises(SystemExit):
        main(["serve", model])
    assert (
        "needs packages that are not installed (fastapi): run `pip install 'slam-asr[serve]'`"
        in capsys.readouterr().err
    )


def test_a_model_that_cannot_be_loaded_ends_the_server_with_a_sentence(model, capsys, monkeypatch):
    def fail(*_, **__):
        raise ModelError("The weights are damaged: copy them again.")

    monkeypatch.setattr("slam_asr.decoding.model.Model.load", fail)
    with pytest.raises(SystemExit) as ended:
        main(["serve", model, "--port", "0"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.err.endswith("The weights are damaged: copy them again.\n")
    assert "Traceback" not in printed.err and "ready" not in printed.out
