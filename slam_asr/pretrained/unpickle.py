"""Reads pickled `.pt` files without running any of their code, and without the software that wrote them.

With `weights_only=True`, torch builds tensors and containers, and looks up no other class or function. But
training programs save more than tensors: configurations, dictionaries and counters, whose classes are not
installed here. This module therefore first collects the names of all classes and functions in the pickle's
opcodes. It then replaces each by an inert class that records its arguments and does nothing, so even the
replacement of a dangerous function is harmless. Nevertheless, a file that names anything outside `HARMLESS`
is refused, because it is either malicious or not a model.
"""

import _compat_pickle
import contextlib
import errno
import io
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np
import torch

from slam_asr.errors import ModelError

HARMLESS = (
    r"(fairseq|examples|omegaconf|collections|typing|enum|pathlib|numpy)\..+",
    r"argparse\.Namespace",
    # The types of values in a configuration; and getattr, with which Python 3.11 pickles members of
    # enumerations.
    r"builtins\.(bool|bytes|complex|dict|float|frozenset|getattr|int|list|object|set|slice|str|tuple|type)",
    # `Optional[int]` and objects of old-style classes are pickled as calls to these two functions.
    r"_?operator\.getitem",
    r"copyreg\._reconstructor",
)
"""Patterns for the full names in the files that fairseq, omegaconf and WavLM's authors write."""

_TORCHS_OWN = re.compile(
    r"torch\..+|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)
"""Names that need no stand-in, because `torch.load` itself allows or refuses them."""
_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 4
"""Number of pickles that are read from a file in torch's format before 1.6: magic number, protocol, sizes of
types, object."""
_DAMAGED_FILE = (UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, RuntimeError, AssertionError)
"""Exceptions of zipfile, pickletools and torch for content that is not in their formats."""
_DAMAGED_VALUE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError)
"""Exceptions for single values of a damaged pickle; a damaged length causes a MemoryError."""
_NUMBER = re.compile(r"[<>=|]?[biuf]\d{1,2}")


class StandIn:
    """Replaces a class or function that the file names. It only records its arguments and state."""

    full_name = ""
    """The full name of the class or function that it replaces."""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "StandIn":
        # The arguments are recorded here, because the opcode NEWOBJ creates objects without calling __init__.
        stand_in = super().__new__(cls)
        stand_in.arguments, stand_in.state = arguments, None
        return stand_in

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(path: Path, allowed: tuple[str, ...] | None = None) -> Any:
    """Read a `.pt` file. Its tensors are memory-mapped instead of read if its format permits.

    Args:
        path: a file that `torch.save` wrote, in its current format or in the format before torch 1.6.
        allowed: full names of the classes that the file may contain in addition to torch's own. By default,
            these are the names that match `HARMLESS`.

    Returns:
        The content, with its tensors on the CPU and a `StandIn` for each object whose class is not torch's.

    Raises:
        ModelError: the file does not exist, is damaged, or names a class that is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no file {path}: check the path.")
    patterns = HARMLESS if allowed is None else tuple(map(re.escape, allowed))
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
            file.seek(0)
            names = {name for pickled in _pickles_of(file, is_zip) for name in _globals_of(pickled)}
        foreign = sorted(name for name in names if not _TORCHS_OWN.fullmatch(name))
        # All names are checked before torch builds the first object.
        for name in foreign:
            if not any(re.fullmatch(pattern, name) for pattern in patterns):
                raise _refusal(path, name)
        with (
            torch.serialization.safe_globals([(_stand_in_for(name), name) for name in foreign]),
            warnings.catch_warnings(action="ignore"),  # torch warns of a damaged protocol number
        ):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        # With strides of zero, a few bytes are a tensor of any size, and computing with it exhausts memory.
        if any(tensor.nbytes > path.stat().st_size for tensor in _tensors_in(content)):
            raise ValueError("a tensor is larger than the file")
        return content
    except (*_DAMAGED_FILE, *_DAMAGED_VALUE, OSError) as error:
        # zipfile seeks where a damaged entry points to, which may be before the file's beginning (EINVAL).
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # torch names the class that it refuses only in the message of its UnpicklingError.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refusal(path, refused[1]) from error
        raise ModelError(f"{path} is damaged or not a checkpoint: copy it again or use another.") from error


def plain(value: Any, within: tuple[int, ...] = ()) -> Any:
    """Convert a configuration of any classes to dicts, lists, strings and numbers.

    Namespaces and omegaconf's containers become dicts and lists; omegaconf's nodes become their values;
    members of enumerations become their values, or their names if only the names are pickled; numpy's scalars
    become numbers; classes become their full names. Other objects become dicts of their attributes or, if
    none are pickled, their arguments. Tensors remain unchanged. An object's reference to an object that
    contains it, such as its parent, becomes None.

    Args:
        value: a value of any type.
        within: ids of the objects that contain the value. omegaconf's nodes refer to their parents, and
            without these ids the recursion would not end.
    """
    if id(value) in within:
        return None
    within = (*within, id(value))
    if isinstance(value, dict):
        return {plain(k, within): plain(v, within) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v, within) for v in value]
    if isinstance(value, type) and issubclass(value, StandIn):
        return value.full_name
    return _plain_object(value, within) if isinstance(value, StandIn) else value


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dicts, lists, tuples and stand-ins."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple | StandIn) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                waiting += value.values()
            else:
                waiting += [*value.arguments, value.state] if isinstance(value, StandIn) else value


def _refusal(path: Path, name: str) -> ModelError:
    return ModelError(f"{path} holds {name}, which no checkpoint needs: it is refused.")


def _stand_in_for(name: str) -> Any:
    if name == "collections.defaultdict":
        # torch's unpickler adds items only to real dicts, not to stand-ins.
        return lambda *_: {}
    return type(name.rpartition(".")[2], (StandIn,), {"full_name": name})


def _globals_of(pickled: IO[bytes]) -> Iterator[str]:
    """Yield the full names, as in Python 3, of all classes and functions in a pickle."""
    for opcode, argument, _ in pickletools.genops(pickled):
        # torch's unpickler refuses all other opcodes that name a class, such as STACK_GLOBAL, so a name that
        # this loop misses is never looked up.
        if opcode.name == "GLOBAL":
            assert argument is not None  # GLOBAL always has "module name"
            module, name = argument.split(" ", 1)
            # Protocol 2 uses Python 2's names. torch translates them in the same way.
            python_3 = (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
            yield ".".join(_compat_pickle.NAME_MAPPING.get((module, name), python_3))


def _pickles_of(file: IO[bytes], is_zip: bool) -> Iterator[IO[bytes]]:
    if not is_zip:
        yield from [file] * _LEGACY_PICKLES
        return
    with zipfile.ZipFile(file) as archive:
        # torch never compresses. A member that unpacks to more than the file's size is there to exhaust
        # memory.
        if sum(member.file_size for member in archive.infolist()) > file.seek(0, io.SEEK_END):
            raise zipfile.BadZipFile("its members are larger than the file")
        for member in archive.namelist():
            if member.rpartition("/")[2] == "data.pkl":
                yield io.BytesIO(archive.read(member))


def _plain_object(value: StandIn, within: tuple[int, ...]) -> Any:
    state, arguments = value.state, value.arguments
    if value.full_name.startswith("numpy."):
        return _number(value)
    if value.full_name.startswith("omegaconf.") and isinstance(state, dict):
        # Containers have `_content` and nodes `_val`. The rest of the state describes parents and types.
        return plain(state.get("_content", state.get("_val")), within)
    # A member of an enumeration is pickled as getattr(class, name).
    if value.full_name == "builtins.getattr":
        return plain(arguments[-1], within)
    if isinstance(state, dict):
        return plain(state, within)
    if len(arguments) == 1:
        return plain(arguments[0], within)
    return [plain(a, within) for a in arguments] or value.full_name


def _number(value: StandIn) -> Any:
    """Decode a numpy scalar, which is pickled as dtype and bytes. Other objects of numpy become None."""
    match value.arguments:
        case (StandIn(full_name="numpy.dtype", arguments=(str(kind), *_)), bytes(data)) if _NUMBER.fullmatch(
            kind
        ):
            with contextlib.suppress(TypeError, ValueError):
                return np.frombuffer(data, np.dtype(kind))[0].item()
    return None
