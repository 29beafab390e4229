"""An LLM that no process holds whole: described first, without values, and read weight by weight where there is a place for each.

transformers compares the folder's files with the description, as it does when it loads them; it only reads no values. Where
it would rename, merge or turn weights on their way into the model, loading is left to it.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from slam_asr.models.weights import load_weights, loading_fails_in_a_sentence, require_finite_weight


class NotOneToOne(Exception):
    """The stored weights are not those of the model, one for one; only transformers knows how to make these of those."""


@dataclass
class StoredWeight:
    """A weight of the LLM that has no values yet: it is on the meta device until someone reads it and puts it there.

    Neither adapters nor FSDP2 lose it: they leave the modules that weights belong to as they are.
    """

    name: str
    """As the LLM calls it."""
    places: list[tuple[nn.Module, str]]
    """Modules that have it, and their names for it: more than one where it is tied."""
    folder: Path
    file: Path
    key: str
    """Its name in the file."""

    @property
    def parameter(self) -> nn.Parameter:
        """What stands at its places now."""
        module, name = self.places[0]
        return getattr(module, name)

    def read_into(self, room: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Fill a tensor with the values, or with as many rows of them as it has, from row `first` on.

        Args:
            room: of any device and dtype. Beside it nothing is kept of the file.
            first: row of the weight.

        Returns:
            The same tensor.

        Raises:
            UserError: they cannot be read, or are not finite.
        """
        if room.numel():
            with (
                loading_fails_in_a_sentence(self.folder, "LLM"),
                safe_open(self.file, framework="pt") as file,
            ):
                # The file is mapped into memory, so that no more of it is read than is copied.
                room.copy_(
                    file.get_slice(self.key)[first : first + len(room)]
                    if room.dim()
                    else file.get_tensor(self.key)
                )
            require_finite_weight(self.name, room, f"The LLM in {self.folder}")
        return room

    def put(self, values: torch.Tensor) -> nn.Parameter:
        """Have a parameter with these values at all of its places."""
        parameter = nn.Parameter(values, requires_grad=self.parameter.requires_grad)
        for module, name in self.places:
            setattr(module, name, parameter)
        return parameter


def describe_stored_llm(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, list[StoredWeight]]:
    """A causal LM as `load_llm` gives it, but for its weights, which are on the meta device; and where each of them is.

    Its buffers are real: every process has all of them.

    Raises:
        NotOneToOne: with the reason, as a part of a sentence; load it whole.
        UserError: the folder holds no causal LM that transformers can read, or its weights are not whole.
    """
    files = _files(folder)
    with loading_fails_in_a_sentence(folder, "LLM"):
        if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None):
            raise NotOneToOne("it is quantised")
    llm = load_weights(AutoModelForCausalLM, folder, dtype, "LLM", values=False)
    if getattr(llm, "_weight_conversions", None):
        raise NotOneToOne("its files have other names than the model")
    wanted = llm.state_dict(keep_vars=True)
    for tied, other in llm.all_tied_weights_keys.items():
        if wanted[tied] is not wanted[other]:
            raise NotOneToOne("weights that it ties are stored twice")
    found = _find(llm, wanted, folder, files)
    _fill_buffers(llm, {weight.name: weight for weight in found})
    return llm, [weight for weight in found if isinstance(wanted[weight.name], nn.Parameter)]


def _files(folder: Path) -> list[Path]:
    """The safetensors files, as transformers chooses them."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise NotOneToOne("it is not stored as safetensors")
    with loading_fails_in_a_sentence(folder, "LLM"):
        return [
            folder / name
            for name in sorted(set(json.loads(index.read_text()).get("weight_map", {}).values()))
        ]


def _find(
    llm: PreTrainedModel, wanted: dict[str, torch.Tensor], folder: Path, files: list[Path]
) -> list[StoredWeight]:
    """All that the model keeps of its state, and where it is."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in llm.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append((module, leaf))
    found: dict[int, StoredWeight] = {}
    prefix = llm.base_model_prefix + "."
    for path in files:
        with loading_fails_in_a_sentence(folder, "LLM"), safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                # A base model is stored without the prefix that it has in the whole.
                name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in wanted), None)
                if name is None or id(wanted[name]) in found:
                    continue
                if list(wanted[name].shape) != file.get_slice(key).get_shape():
                    raise NotOneToOne("its files have other shapes than the model")
                found[id(wanted[name])] = StoredWeight(name, places[id(wanted[name])], folder, path, key)
    if any(id(tensor) not in found for tensor in wanted.values()):
        raise NotOneToOne("its files have other names than the model")
    return list(found.values())


def _fill_buffers(llm: PreTrainedModel, stored: dict[str, StoredWeight]) -> None:
    """Make the buffers real: from the files, or else computed by the model's own rule, as transformers does behind loading."""
    names = {name for name, _ in llm.named_buffers(remove_duplicate=False)}
    read = {
        name: stored[name].read_into(torch.empty_like(buffer, device="cpu"))
        for name, buffer in llm.named_buffers(remove_duplicate=False)
        if name in stored
    }
    first, second = (_computed_buffers(llm, names, read, fill) for fill in (0, 1))
    if not all(torch.equal(first[name], second[name]) for name in names):
        # They are what they were filled with.
        raise NotOneToOne("it does not say how its buffers are computed")


def _computed_buffers(
    llm: PreTrainedModel, names: set[str], read: dict[str, torch.Tensor], fill: int
) -> dict[str, torch.Tensor]:
    made: dict[int, torch.Tensor] = {}
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        module = llm.get_submodule(path)
        buffer = module._buffers[leaf]
        real = made.setdefault(
            id(buffer), read[name] if name in read else torch.full_like(buffer, fill, device="cpu")
        )
        real._is_hf_initialized = name in read  # transformers' mark of what is to stay as it is
        module._buffers[leaf] = real
    for module in llm.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        llm.initialize_weights()
    return {name: buffer for name, buffer in llm.named_buffers(remove_duplicate=False)}


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Let what looks at weights find some where there are only descriptions: on the CPU, of the same shapes, all zero, without memory of their own."""
    described = [
        (m, name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False) if p.is_meta
    ]
    for module, name, parameter in described:
        zero = torch.zeros((), dtype=parameter.dtype)
        setattr(
            module, name, nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)
        )
    try:
        yield
    finally:
        for module, name, parameter in described:
            setattr(module, name, parameter)
