"""What a training cannot do here is one sentence, before a process is started."""

import pytest

from slam_asr.errors import UserError
from slam_asr.planning import fitting
from slam_asr.recipe import load_recipe
from slam_asr.training import train as stage


@pytest.fixture
def begin(prepared, monkeypatch, tmp_path):
    """Train with changes to the recipe, as far as the first process."""
    recipe, manifests, features = prepared
    started = []
    monkeypatch.setattr(stage, "_torchrun", lambda *_: started.append(True))

    def run(**options) -> None:
        with pytest.raises(FileNotFoundError) if not options.pop("refused", False) else pytest.raises(UserError) as raised:
            stage.train(load_recipe(recipe, {f"training.{key}": value for key, value in options.items()}), f"{manifests}/train.jsonl", str(tmp_path / "t"), features)
        assert bool(started) == (raised.type is FileNotFoundError)
        return str(raised.value)

    return run


def test_more_memory_than_there_is(begin, monkeypatch):
    begin()
    monkeypatch.setattr(fitting, "host_memory", lambda: 1e5)


