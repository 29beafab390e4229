"""Pickled `.pt` files, read without running anything in them and without the software that wrote them.

torch reads with `weights_only=True`: it builds tensors and containers, and looks no other name up.
What a training program leaves beside the tensors (its configuration, its dictionaries, its
counters) names classes that are not installed here. The names are taken from the pickle's opcodes
first, and each becomes an inert class that keeps what it is given and does nothing. So even a
stand-in for a dangerous function would be harmless; all the same a file that names anything outside
`HARMLESS` is refused, for it was made to do harm, or is no model.
"""

import _compat_pickle
import contextlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np
import torch

from slam_asr.errors import UserError

HARMLESS = (
    r"(fairseq|examples|omegaconf|collections|typing|enum|pathlib|numpy)\..+",
    r"argparse\.Namespace",
    # Types that a configuration names, and how Python 3.11 writes the member of an enumeration.
    r"builtins\.(bool|bytes|complex|dict|float|frozenset|getattr|int|list|object|set|slice|str|tuple|type)",
    # How `Optional[int]` and objects of old classes are written.
    r"_?operator\.getitem",
    r"copyreg\._reconstructor",
)
"""What fairseq, omegaconf and WavLM's authors have in their files, as patterns of full names."""

_TORCHS_OWN = re.compile(
    r"torch\..+|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)
"""torch itself decides about these."""
_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 4
"""Magic number, protocol, sizes of the system, then the object: the pickles at the front of a file before torch 1.6."""
_DAMAGED = (
    UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)
_NUMBER = re.compile(r"[<>=|]?[biuf]\d{1,2}")


class StandIn:
    """Stands for a class or function of the file's: keeps its arguments and its state, and does nothing."""

    full_name = ""
    """Of what it stands for."""

    def __new__(cls, *arguments: Any) -> "StandIn":
        # Not in __init__: objects made by the opcode NEWOBJ never get there.
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(path: Path, allowed: tuple[str, ...] | None = None) -> Any:
    """A `.pt` file's content; tensors are mapped from the file, not read, where its format permits.

    Args:
        path: a file that `torch.save` wrote, in its present format or in that before torch 1.6.
        allowed: full names of the only classes that may stand beside tensors; without it, `HARMLESS`.

    Returns:
        The content, with a `StandIn` for every object of a foreign class.

    Raises:
        UserError: there is no such file, it is damaged, or it names what is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}: check the path.")
    patterns = HARMLESS if allowed is None else tuple(map(re.escape, allowed))
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
            file.seek(0)
            foreign = sorted(name for name in _globals_of(file, is_zip) if not _TORCHS_OWN.fullmatch(name))
        for name in foreign:
            if not any(re.fullmatch(pattern, name) for pattern in patterns):
                raise _refusal(path, name)
        with torch.serialization.safe_globals([(_stand_in_for(name), name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _DAMAGED as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise _refusal(path, named[1]) from error
        raise UserError(f"{path} is damaged or no checkpoint: copy it again or take another.") from error


def plain(value: Any) -> Any:
    """A configuration as dicts, lists, strings and numbers, whatever classes it was pickled from.

    Namespaces and omegaconf's containers become dicts and lists, its nodes their values, members of
    enumerations their values (or names, where only those are stored), numpy's scalars numbers, other
    objects a dict of their attributes. Tensors stay as they are; a reference back to an object that
    holds it becomes None.
    """
    return _plain(value, ())


def _refusal(path: Path, name: str) -> UserError:
    return UserError(f"{path} holds {name}, which a checkpoint has no need of: it is refused.")


def _stand_in_for(name: str) -> Any:
    if name == "collections.defaultdict":
        # torch fills real dicts only, and a dict is all that it is here.
        return _empty_dict
    return type(name.rpartition(".")[2], (StandIn,), {"full_name": name})


def _empty_dict(*_: Any) -> dict:
    return {}


def _globals_of(file: IO[bytes], is_zip: bool) -> set[str]:
    """Full names of all classes and functions that a file's pickles refer to, by their names in Python 3."""
    names = set()
    with contextlib.ExitStack() as stack:
        for pickled in _pickles_of(file, stack) if is_zip else [file] * _LEGACY_PICKLES:
            for opcode, argument, _ in pickletools.genops(pickled):
                if opcode.name == "GLOBAL":
                    module, name = argument.split(" ", 1)
                    # As torch does on reading: names of Python 2, which protocol 2 writes, become those of Python 3.
                    if (module, name) in _compat_pickle.NAME_MAPPING:
                        module, name = _compat_pickle.NAME_MAPPING[module, name]
                    else:
                        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
                    names.add(f"{module}.{name}")
    return names


def _pickles_of(file: IO[bytes], stack: contextlib.ExitStack) -> Iterator[IO[bytes]]:
    archive = stack.enter_context(zipfile.ZipFile(file))
    for member in archive.namelist():
        if member.rpartition("/")[2] == "data.pkl":
            yield BytesIO(archive.read(member))


def _plain(value: Any, within: tuple[int, ...]) -> Any:
    if id(value) in within:
        return None
    within = (*within, id(value))
    if isinstance(value, dict):
        return {_plain(k, within): _plain(v, within) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v, within) for v in value]
    if isinstance(value, type) and issubclass(value, StandIn):
        return value.full_name
    if isinstance(value, StandIn):
        return _plain_object(value, within)
    return value


def _plain_object(value: StandIn, within: tuple[int, ...]) -> Any:
    state, arguments = value.state, value.arguments
    if value.full_name.startswith("numpy."):
        return _number(value)
    if value.full_name.startswith("omegaconf.") and isinstance(state, dict):
        # Not the rest of its state, which refers to the container's parents and types.
        return _plain(state.get("_content", state.get("_val")), within)
    if value.full_name == "builtins.getattr":
        return _plain(arguments[-1], within)
    if isinstance(state, dict):
        return _plain(state, within)
    if len(arguments) == 1:
        return _plain(arguments[0], within)
    return [_plain(a, within) for a in arguments] or value.full_name


def _number(value: StandIn) -> Any:
    """The value of numpy's scalar, which is pickled as its type and its bytes; None for its other objects."""
    match value.arguments:
        case (StandIn(full_name="numpy.dtype", arguments=(str(kind), *_)), bytes(data)) if _NUMBER.fullmatch(
            kind
        ):
            with contextlib.suppress(TypeError, ValueError):
                return np.frombuffer(data, np.dtype(kind))[0].item()
    return None
