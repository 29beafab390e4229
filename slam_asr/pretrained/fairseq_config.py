"""Reads the configurations in the original files of HuBERT, wav2vec 2.0 (both of fairseq) and WavLM.

The model's sizes come from the configuration, so a missing layer is noticed. Sizes that the configuration
lacks come from the tensors.
"""

import ast
import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import HubertConfig, PretrainedConfig, Wav2Vec2Config, WavLMConfig

from slam_asr.config.schema import one_sentence
from slam_asr.errors import ModelError

TensorDict = dict[str, torch.Tensor]

_NORMS = {"default": "group", "layer_norm": "layer"}
"""fairseq's `extractor_mode` → transformers' `feat_extract_norm`."""
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu"}
"""fairseq's `activation_fn` → transformers' `hidden_act`: the activation of the feed-forward layers."""
_WRONG_VALUES = (LookupError, ValueError, TypeError, ZeroDivisionError, StrictDataclassError)
"""Exceptions for sizes that are missing, of another type, or impossible."""
_WRONG_TEXTS = (SyntaxError, MemoryError, RecursionError)
"""Exceptions of Python's parser for a text that is not Python, or is nested too deeply."""
_MAX_CONVOLUTIONS, _MAX_LAYOUT_LENGTH = 100, 1000
"""Limits for the text that describes the convolutions: a malicious file could otherwise exhaust memory."""


class FairseqOptions:
    """Looks up options in the sections of fairseq's configuration.

    Args:
        content: the configuration in the file, as nested dicts.
        tuned: whether the model was fine-tuned. If so, the options of its pretrained model, which are nested
            in `w2v_args`, come first. In a pretrained model, `get` ignores `w2v_args`.
        where: the file's name, for error messages.
    """

    def __init__(self, content: dict[str, Any], tuned: bool, where: str) -> None:
        self._content, self.where = content, where
        model = _dict(content, "model")
        self._pretrained = _dict(model, "w2v_args") or _dict(content, "w2v_args")
        nested = [_dict(self._pretrained, "model"), self._pretrained] if tuned else []
        self.sections = [section for section in (*nested, model, content) if section]
        """The sections that may contain the encoder's options, the most specific first."""

    def get(self, name: str, default: Any = None) -> Any:
        """Return an option of the encoder or, if it is missing, the default.

        Raises:
            ModelError: the option is missing, and the default is None.
        """
        # An option that is None counts as missing, so that a less specific section can supply it.
        values = (section.get(name) for section in self.sections)
        value = next((value for value in values if value is not None), default)
        if value is None:
            raise ModelError(f"{self.where} cannot be converted: its configuration lacks {name}.")
        return value

    def normalizes(self) -> bool:
        """Return whether the encoder needs normalised waveforms.

        Raises:
            ModelError: the configuration does not state it.
        """
        candidates = (
            _dict(self._content, "task"),
            _dict(self._content, "model"),
            self._content,
            _dict(self._pretrained, "task"),
            *self.sections,
        )
        # The first section with a value decides: a fine-tuned model's own option comes before that of the
        # pretrained model. A string is only omegaconf's reference to another section: ${task.normalize}.
        for section in candidates:
            if isinstance(section.get("normalize"), int):
                return bool(section["normalize"])
        raise ModelError(
            f"{self.where} cannot be converted: its configuration does not say whether waveforms are "
            "normalised (normalize)."
        )


def _dict(section: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a subsection, or an empty dict if the section has none of this name."""
    value = section.get(key)
    return value if isinstance(value, dict) else {}


def waveform_config(encoder: TensorDict, has_targets: bool, options: FairseqOptions) -> PretrainedConfig:
    """Choose transformers' configuration of WavLM, HuBERT or wav2vec 2.0, and fill it in.

    Args:
        encoder: the encoder's tensors, keyed by fairseq's names.
        has_targets: whether the file has embeddings of HuBERT's targets; wav2vec 2.0 has no such targets.
        options: fairseq's configuration.

    Raises:
        ModelError: the configuration lacks an option, or contradicts the tensors.
    """
    try:
        sizes = _sizes(encoder, options)
        # Of the three kinds, only WavLM has relative positions.
        bias = encoder.get("encoder.layers.0.self_attn.relative_attention_bias.weight")
        if bias is not None:
            return WavLMConfig(
                **sizes,
                num_buckets=options.get("num_buckets", bias.shape[0]),
                max_bucket_distance=options.get("max_distance"),
            )
        # Fine-tuning removes the embeddings of HuBERT's targets. Only the name in the configuration then
        # distinguishes HuBERT from wav2vec 2.0.
        names = str([s.get("_name", s.get("arch", "")) for s in options.sections]).lower()
        return (HubertConfig if has_targets or "hubert" in names else Wav2Vec2Config)(**sizes)
    except (*_WRONG_VALUES, *_WRONG_TEXTS) as error:
        raise ModelError(
            f"{options.where} lacks a part of an encoder, or describes one wrongly; fetch it again: "
            f"{one_sentence(error)}"
        ) from error


def _sizes(tensors: TensorDict, options: FairseqOptions) -> dict[str, Any]:
    """Derive the arguments that transformers' three configurations have in common.

    Args:
        tensors: the encoder's tensors, keyed by fairseq's names.
        options: fairseq's configuration. Most missing options are derived from the tensors' shapes.

    Raises:
        ValueError, LookupError, TypeError, SyntaxError: the configuration and the tensors contradict each
            other, or a tensor is missing.
        ModelError: an option is missing that cannot be derived from the tensors.
    """
    convolutions = sorted(
        (n for n in tensors if re.fullmatch(r"feature_extractor\.conv_layers\.\d+\.0\.weight", n)),
        key=lambda n: int(n.split(".")[2]),
    )
    shapes = [tuple(tensors[n].shape) for n in convolutions]
    layout = _convolutions(options.get("conv_feature_layers"))
    if [(s[0], s[2]) for s in shapes] != [(dim, kernel) for dim, kernel, _ in layout]:
        raise ValueError(f"conv_feature_layers is {layout}, but the shapes of its convolutions are {shapes}")
    # Shape of the convolution that encodes positions: [width, width / groups, kernel].
    position = tensors["encoder.pos_conv.0.weight_v"].shape
    width = position[0]
    # WavLM's grep_a has the shape [1, heads, 1, 1]. No tensor of the other kinds shows the number of heads.
    grep = tensors.get("encoder.layers.0.self_attn.grep_a")
    heads = None if grep is None else grep.shape[1]
    mode = "layer_norm" if "feature_extractor.conv_layers.0.2.1.weight" in tensors else "default"
    inner_width = len(tensors["encoder.layers.0.fc1.weight"])
    found_layers = {n.split(".")[2] for n in tensors if n.startswith("encoder.layers.")}
    layers = options.get("encoder_layers", len(found_layers))
    # A huge number of layers would exhaust memory when the model is built, even without values.
    if layers > len(tensors):
        raise ValueError(f"encoder_layers is {layers}, but there are only {len(tensors)} tensors")
    return {
        "hidden_size": options.get("encoder_embed_dim", width),
        "num_hidden_layers": layers,
        "num_attention_heads": options.get("encoder_attention_heads", heads),
        "intermediate_size": options.get("encoder_ffn_embed_dim", inner_width),
        "hidden_act": _ACTIVATIONS[options.get("activation_fn", "gelu")],
        "conv_dim": [dim for dim, _, _ in layout],
        "conv_kernel": [kernel for _, kernel, _ in layout],
        "conv_stride": [stride for _, _, stride in layout],
        "num_feat_extract_layers": len(layout),
        "conv_bias": options.get("conv_bias", "feature_extractor.conv_layers.0.0.bias" in tensors),
        "feat_extract_norm": _NORMS[options.get("extractor_mode", mode)],
        # The place of the norms changes no tensor, so this option has no default.
        "do_stable_layer_norm": bool(options.get("layer_norm_first")),
        "num_conv_pos_embeddings": options.get("conv_pos", position[2]),
        "num_conv_pos_embedding_groups": options.get("conv_pos_groups", width // position[1]),
    }


def _convolutions(text: Any) -> list[tuple[int, int, int]]:
    """Parse fairseq's description of the convolutions, which is Python code, without running it.

    Args:
        text: a text such as `[(512,10,5)] + [(512,3,2)] * 4`, or a list that is already parsed.

    Returns:
        For each convolution (channels, kernel, stride), with kernel and stride in time steps of its input.

    Raises:
        ValueError, TypeError, SyntaxError: the text contains anything but lists, sums and multiples, or
            exceeds the limits.
    """
    if not isinstance(text, str):
        return [tuple(layer) for layer in text]

    def value(node: ast.AST) -> Any:
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Mult(), ast.Constant(int(times))):
                repeated = value(left)
                # The limit is checked before multiplying, because nested multiples grow exponentially.
                if not 0 <= times * len(repeated) <= _MAX_CONVOLUTIONS:
                    raise ValueError(f"{times} times {len(repeated)} convolutions")
                return repeated * times
        return ast.literal_eval(node)

    if len(text) > _MAX_LAYOUT_LENGTH:
        raise ValueError(f"conv_feature_layers has {len(text)} characters")
    layers = [tuple(layer) for layer in value(ast.parse(text.strip(), mode="eval").body)]
    if not all(len(layer) == 3 and all(isinstance(n, int) for n in layer) for layer in layers):
        raise ValueError(f"conv_feature_layers is {text}")
    return layers
