"""Untrusted pickles are read without the software that wrote them, and no code in them ever runs."""

import argparse
import sys
import tracemalloc
import types
import zipfile
from collections import defaultdict
from enum import Enum
from typing import Optional

import numpy as np
import pytest
import torch
from hypothesis import example, given

from slam_asr.errors import UserError
from slam_asr.pretrained.unpickle import plain, read_pickle
from tests.random_inputs import examples, within_a_second
from tests.test_audio_fuzz import damaged


class Harm:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def fairseq(monkeypatch):
    """A module with classes like fairseq's, importable while the test writes a file."""
    module = types.ModuleType("fairseq.data.dictionary")
    for name, kind in {
        "Dictionary": type("Dictionary", (), {}),
        "Choice": Enum("Choice", {"constant": "constant", "linear": "linear"}),
    }.items():
        kind.__module__ = module.__name__
        setattr(module, name, kind)
    for name in ("fairseq", "fairseq.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_classes_that_are_not_installed_become_their_contents(fairseq, tmp_path, monkeypatch):
    symbols = fairseq.Dictionary()
    symbols.symbols, symbols.count = ["a", "b"], {"a": 3}
    content = {
        "args": argparse.Namespace(layers=3, mode=fairseq.Choice.constant),
        "dictionary": symbols,
        "model": {"w": torch.ones(2)},
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        with monkeypatch.context() as patch:
            for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
                patch.delitem(sys.modules, name)
            read = read_pickle(tmp_path / "file.pt")
            assert not any(name.startswith("fairseq") for name in sys.modules)
        assert torch.equal(read["model"]["w"], torch.ones(2))
        assert plain(read["args"])["layers"] == 3 and plain(read["args"])["mode"] == "constant"
        assert plain(read["dictionary"]) == {"symbols": ["a", "b"], "count": {"a": 3}}


def test_an_omegaconf_configuration_becomes_its_values(tmp_path, monkeypatch):
    """omegaconf's containers refer to their parents and to types from `typing`, and contain a defaultdict."""
    module = types.ModuleType("omegaconf.dictconfig")
    for name in ("DictConfig", "AnyNode"):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))
    root, inner, leaf = module.DictConfig(), module.DictConfig(), module.AnyNode()
    # As fairseq writes the type: `int | None` is pickled differently.
    about = {"ref_type": Optional[int], "object_type": dict, "resolver_cache": defaultdict(dict)}  # noqa: UP045
    leaf.__dict__ = {"_metadata": about, "_parent": inner, "_val": 48}
    inner.__dict__ = {"_metadata": about, "_parent": root, "_content": {"encoder_layers": leaf}}
    root.__dict__ = {
        "_metadata": about,
        "_parent": None,
        "_content": {"model": inner, "loss": np.float64(0.5)},
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"cfg": root}, tmp_path / "file.pt")
    assert plain(read_pickle(tmp_path / "file.pt")) == {"cfg": {"model": {"encoder_layers": 48}, "loss": 0.5}}


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "subprocess.check_output"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, name):
    mark = tmp_path / "it ran"
    module, _, function = name.rpartition(".")
    harm = Harm(
        getattr(__import__(module), function),
        f"open({str(mark)!r}, 'w')" if "eval" in name else ["touch", str(mark)],
    )
    torch.save({"model": {"w": torch.ones(1)}, "args": harm}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="is refused"):
        read_pickle(tmp_path / "file.pt")
    assert not mark.exists()


def test_an_explicit_allow_list_replaces_the_default_one(tmp_path):
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "file.pt")
    assert plain(read_pickle(tmp_path / "file.pt")) == {"args": {"a": 1}}
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        read_pickle(tmp_path / "file.pt", allowed=("deepspeed.nothing",))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 and no more", b"just text, and not short", bytes(range(256))]
)
def test_damaged_and_foreign_files_are_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(UserError, match="damaged or not a checkpoint") as raised:
        read_pickle(tmp_path / "file.pt")
    assert "\n" not in raised.value.args[0]


def test_a_zip_archive_that_unpacks_to_far_more_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data.pkl", bytes(2**26))
    assert (tmp_path / "file.pt").stat().st_size < 2**17
    tracemalloc.start()
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        read_pickle(tmp_path / "file.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_few_bytes_that_stand_for_a_huge_tensor_are_refused(tmp_path):
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"args": argparse.Namespace(weights=[huge])}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        read_pickle(tmp_path / "file.pt")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_randomly_damaged_file_is_read_or_refused_in_one_sentence(tmp_path, is_zip, recwarn):
    content = {"model": {"weight": torch.ones(2)}, "step": 3, "args": argparse.Namespace(a=[1, ("x", None)])}
    file = tmp_path / "file.pt"
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    intact = file.read_bytes()
    # This byte is part of the offset of the archive's list of members. The change of it below puts the list
    # before the file's beginning.
    place = intact.rindex(b"PK\x06\x06") + 50 if is_zip else 0

    @examples(100)
    @given(damaged(intact))
    @example(intact[:place] + b"\1" + intact[place + 1 :])
    @example(intact.replace(b"\x80\x02", b"\x80\xaa"))  # another protocol, of which torch warns
    def check(damaged_content):
        file.write_bytes(damaged_content)
        try:
            with within_a_second():
                read_pickle(file)
        except UserError as error:
            assert "\n" not in error.args[0]

    check()
    assert not recwarn.list
