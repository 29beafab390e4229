"""Loads an LLM weight by weight, so that no process ever holds the complete model.

The LLM is first built on the meta device, which gives every weight a name, shape and dtype but no memory. A
weight is read from its safetensors file only when memory for it has been allocated, for example for the rows
that one process owns under FSDP2. transformers checks the files against the model as in an ordinary load, but
does not read the values. If transformers would have to rename, merge or transpose weights while loading, this
module raises `NotLazilyLoadable`, and the caller loads the complete model with transformers instead.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from slam_asr.pretrained.load_weights import load_errors_as_model_errors, load_weights, require_finite_weight
from slam_asr.pretrained.model_files import weight_names


class NotLazilyLoadable(Exception):
    """An LLM cannot be loaded weight by weight, so transformers must load all of it.

    Its files are not safetensors, or their tensors do not correspond one to one to the model's weights, or
    the values of a buffer cannot be computed. The message is a clause that states the reason, such as
    "it is not saved as safetensors".
    """


@dataclass
class LazyWeight:
    """A weight of the LLM that is on the meta device until `put` replaces it.

    It stays valid when adapters are added or FSDP2 shards the LLM, because neither replaces the modules that
    own the weights.
    """

    name: str
    """The weight's name in the LLM."""
    places: list[tuple[nn.Module, str]]
    """Each module that owns the weight, with the name of its attribute. A tied weight has several owners."""
    folder: Path
    """The LLM's folder, for error messages."""
    file: Path
    key: str
    """The weight's name in the file."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the owning modules hold now; `put` replaces it."""
        module, name = self.places[0]
        return getattr(module, name)

    def read_into(self, target: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Fill a tensor with the weight's values, or with some of its rows.

        Args:
            target: `[rows, …]`, on any device and of any dtype, with at most as many rows as the weight. Only
                these rows of the file are read.
            first_row: the weight's row that becomes row 0 of `target`.

        Returns:
            `target` itself, filled.

        Raises:
            ModelError: the values cannot be read, or are not finite.
        """
        if target.numel():
            with (
                load_errors_as_model_errors(self.folder, "LLM"),
                safe_open(self.file, framework="pt") as file,
            ):
                # The file is memory-mapped: only the pages of the copied rows are read from disk.
                target.copy_(
                    file.get_slice(self.key)[first_row : first_row + len(target)]
                    if target.dim()
                    else file.get_tensor(self.key)
                )
            require_finite_weight(self.name, target, f"The LLM in {self.folder}")
        return target

    def put(self, values: torch.Tensor) -> nn.Parameter:
        """Replace the parameter by one with these values, in every module that owns it.

        Args:
            values: a tensor of any shape, device and dtype; it is not copied.

        Returns:
            The new parameter. It requires a gradient if the old one did.
        """
        parameter = nn.Parameter(values, requires_grad=self.parameter.requires_grad)
        for module, name in self.places:
            setattr(module, name, parameter)
        return parameter


def describe_lazy_llm(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, list[LazyWeight]]:
    """Build a causal LM as `load_llm` does, but leave its weights on the meta device.

    Args:
        folder: a folder with transformers' files.
        dtype: dtype of the weights.
        trust_remote_code: whether code in the folder may run.

    Returns:
        The LLM, whose weights are on the meta device and whose buffers are on the CPU with their values; and
        one entry per weight, from which its values can be read. A tied weight has a single entry.

    Raises:
        NotLazilyLoadable: the LLM must be loaded completely instead.
        ModelError: the folder holds no causal LM that transformers can load, or weights are missing or
            damaged.
    """
    files = list(weight_names(folder))
    if not files or files[0].suffix != ".safetensors":
        raise NotLazilyLoadable("it is not saved as safetensors")
    llm = load_weights(
        AutoModelForCausalLM, folder, dtype, "LLM", values=False, trust_remote_code=trust_remote_code
    )
    # transformers leaves this list on a model whose weights it renames, merges or splits while it loads them.
    if getattr(llm, "_weight_conversions", None):
        raise NotLazilyLoadable("its files have other names than the model")
    # keep_vars returns the parameters themselves instead of detached copies, so tied weights are one object.
    state = llm.state_dict(keep_vars=True)
    # If the files contain both copies of a tied weight, transformers ties them only if they are equal. On the
    # meta device it cannot compare their values, so it leaves them untied.
    for tied, other in llm.all_tied_weights_keys.items():
        if state[tied] is not state[other]:
            raise NotLazilyLoadable("weights that it ties are in its files twice")
    lazy = _match_files(llm, state, folder, files)
    _fill_buffers(llm, {weight.name: weight for weight in lazy})
    # The files may also contain buffers. `_fill_buffers` has already read those.
    return llm, [weight for weight in lazy if isinstance(state[weight.name], nn.Parameter)]


def _match_files(
    llm: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path, files: list[Path]
) -> list[LazyWeight]:
    """Find the file and the key of every tensor in the model's state.

    Args:
        llm: on the meta device.
        state: the LLM's parameters and persistent buffers, keyed by name.
        folder: the files' folder, for error messages.
        files: the LLM's safetensors files.

    Returns:
        One entry per tensor; a tied weight has a single entry.

    Raises:
        NotLazilyLoadable: a tensor is in no file, or has another shape there.
        ModelError: a file is damaged.
    """
    # Tensors are compared by identity, because a tied weight is one tensor with several names and owners.
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in llm.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append((module, leaf))
    matched: dict[int, LazyWeight] = {}
    prefix = llm.base_model_prefix + "."
    for path in files:
        with load_errors_as_model_errors(folder, "LLM"), safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                # Files that were written from the base model, without the output layer, lack the prefix that
                # the base model has inside the causal LM. transformers accepts names with and without it.
                name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in state), None)
                if name is None or id(state[name]) in matched:
                    continue
                if list(state[name].shape) != file.get_slice(key).get_shape():
                    raise NotLazilyLoadable("its files have other shapes than the model")
                matched[id(state[name])] = LazyWeight(name, places[id(state[name])], folder, path, key)
    if any(id(tensor) not in matched for tensor in state.values()):
        raise NotLazilyLoadable("its files have other names than the model")
    return list(matched.values())


def _fill_buffers(llm: PreTrainedModel, lazy: dict[str, LazyWeight]) -> None:
    """Read the buffers from the files, and compute the others as transformers does after loading.

    Some buffers, such as the frequencies of rotary embeddings, are in no file. The model's `_init_weights`
    computes them, but not every model does so for every buffer, and nothing reports those that it leaves out.
    The buffers are therefore computed twice, in memory that was filled with 0 and then with 1. A buffer with
    two different results was never computed, so its values are unknown.

    Raises:
        NotLazilyLoadable: the model does not compute one of its buffers.
        ModelError: a buffer cannot be read, or is not finite.
    """
    buffers = dict(llm.named_buffers(remove_duplicate=False))
    from_files = {
        name: lazy[name].read_into(torch.empty_like(buffer, device="cpu"))
        for name, buffer in buffers.items()
        if name in lazy
    }
    first, second = (_computed_buffers(llm, sorted(buffers), from_files, fill) for fill in (0, 1))
    if not all(torch.equal(first[name], second[name]) for name in buffers):
        raise NotLazilyLoadable("it does not define how its buffers are computed")


def _computed_buffers(
    llm: PreTrainedModel, names: list[str], from_files: dict[str, torch.Tensor], fill: int
) -> dict[str, torch.Tensor]:
    """Put buffers on the CPU into the LLM and let transformers compute those that are in no file.

    Args:
        llm: the LLM. Its weights stay on the meta device, where initialising them costs nothing.
        names: names of all buffers, including each alias of a shared one.
        from_files: the buffers that were read, keyed by name.
        fill: the value of every other buffer before transformers computes it.

    Returns:
        All buffers of the LLM, keyed by name.
    """
    # A shared buffer gets one replacement, so that its aliases in several modules stay aliases.
    replacements: dict[int, torch.Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = llm.get_submodule(path)
        buffer = module._buffers[leaf]
        assert buffer is not None  # `named_buffers` leaves out empty entries
        replacement = replacements.setdefault(
            id(buffer),
            from_files[name] if name in from_files else torch.full_like(buffer, fill, device="cpu"),
        )
        # transformers' init functions skip tensors with this mark. Without it they would overwrite the values
        # that were read from the files. torch's type annotations do not know the mark.
        replacement._is_hf_initialized = name in from_files  # type: ignore[attr-defined]
        module._buffers[leaf] = replacement
    # `from_pretrained` has marked every module as initialised, and `initialize_weights` skips such modules.
    for module in llm.modules():
        module._is_hf_initialized = False
    # A model's initialisation may draw random numbers. The fork leaves the caller's random state unchanged.
    with torch.random.fork_rng(devices=[]):
        llm.initialize_weights()
    return dict(llm.named_buffers(remove_duplicate=False))


@contextlib.contextmanager
def zero_placeholders(model: nn.Module) -> Iterator[None]:
    """Temporarily replace weights on the meta device by zeros on the CPU, for code that inspects weights.

    peft, for example, places an adapter on the device of the weight that it adapts. The zeros have the right
    shape and dtype but share a single element, so they need almost no memory. The meta weights are restored
    at the end.
    """
    on_meta = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in on_meta:
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        setattr(module, name, nn.Parameter(zeros, requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in on_meta:
            setattr(module, name, parameter)
