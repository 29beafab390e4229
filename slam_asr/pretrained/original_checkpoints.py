"""Converts the original checkpoint files of speech encoders to folders that transformers loads.

The supported models are OpenAI's Whisper, Microsoft's WavLM, and fairseq's HuBERT and wav2vec 2.0. The last
two may be pretrained or fine-tuned with CTC, which changes fairseq's layout. A fine-tuned WavLM is read if
its file has the layout of the pretrained one. fairseq is not needed, and no code from the file is run. The
model's sizes come from the configuration in the file, so a missing layer is noticed. Every tensor is renamed,
or dropped because no encoder needs it, or causes an error.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, PretrainedConfig, WhisperConfig

from slam_asr.config.schema import one_sentence
from slam_asr.errors import ModelError
from slam_asr.pretrained.fairseq_config import FairseqOptions, TensorDict, waveform_config
from slam_asr.pretrained.lazy_tensors import write_one_by_one
from slam_asr.pretrained.load_weights import require_finite_weight
from slam_asr.pretrained.unpickle import plain, read_pickle

_WHISPER = [
    (r"positional_embedding", "embed_positions.weight"),
    (r"token_embedding", "embed_tokens"),
    (r"ln_post", "layer_norm"),
    (r"decoder\.ln\.", "decoder.layer_norm."),
    (r"blocks\.", "layers."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"cross_attn_ln", "encoder_attn_layer_norm"),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"cross_attn\.", "encoder_attn."),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"\.out\.", ".out_proj."),
]
"""Patterns in OpenAI's names and their replacements in transformers', applied one after the other."""
_WAVEFORM = [
    (r"^mask_emb$", "masked_spec_embed"),
    (r"^(feature_extractor\.conv_layers\.\d+)\.0\.", r"\1.conv."),
    # The norm after a convolution is module 2 if it is a group norm, and module 2.1 if it is a layer norm.
    (r"^(feature_extractor\.conv_layers\.\d+)\.2\.(?:1\.)?", r"\1.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    # Weight normalisation: `original0` is the magnitude g, and `original1` the direction v.
    (r"^encoder\.pos_conv\.0\.weight_g$", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"^encoder\.pos_conv\.0\.weight_v$", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.self_attn\.", ".attention."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
    (r"\.grep_a$", ".gru_rel_pos_const"),
    (r"\.grep_linear\.", ".gru_rel_pos_linear."),
    (r"\.relative_attention_bias\.", ".rel_attn_embed."),
]
"""Patterns in fairseq's names, which WavLM also uses, and their replacements in transformers'."""

_TUNED = "w2v_encoder.w2v_model."
"""Prefix of the names of the encoder's tensors in a model that fairseq fine-tuned."""
_HEADS = re.compile(
    r"w2v_encoder\.proj\..*|label_embs_concat|final_proj\..*|quantizer\..*|project_q\..*|project_hid\..*|target_glu\..*"
    r"|layer_norm_for_extract\..*|proj\..*"
)
"""Names of tensors that only pretraining or CTC uses. They are dropped."""


@dataclass
class Original:
    """An original checkpoint of a known kind."""

    config: PretrainedConfig
    """The configuration with which transformers builds the model."""
    tensors: TensorDict
    """The tensors to convert, by their original names: the encoder's and, for Whisper, also a decoder's."""
    rules: list
    """Patterns and replacements that turn the original names into transformers'."""
    normalize: bool | None = None
    """Whether the encoder needs normalised waveforms; None for Whisper, which takes no waveforms."""
    dropped: list[str] = field(default_factory=list)
    """Names of the tensors that are not converted."""


def convert_original(source: Path, folder: Path) -> str:
    """Convert an original file to config.json, model.safetensors and preprocessor_config.json.

    Args:
        source: the `.pt` file.
        folder: where the three files are written. config.json is the last, so an interrupted conversion
            leaves none.

    Returns:
        One line with the kind and size of the model.

    Raises:
        ModelError: the file is damaged or of another kind, or one of its tensors is missing, unexpected, of
            another shape or not finite; the message names the tensor.
    """
    original = recognise(read_pickle(source), str(source))
    weights = map_tensors(original, str(source))
    for name, tensor in weights.items():
        require_finite_weight(f"the tensor that becomes {name}", tensor, str(source), "fetch it again")
    folder.mkdir(parents=True, exist_ok=True)
    # An earlier config.json must not vouch for the new weights if the conversion is interrupted.
    (folder / "config.json").unlink(missing_ok=True)
    write_one_by_one(folder / "model.safetensors", weights, like=weights)
    _feature_extractor(original).save_pretrained(folder)
    original.config.architectures = [type(_skeleton(original.config)).__name__]
    original.config.dtype = next(iter(weights.values())).dtype
    original.config.save_pretrained(folder)
    count = sum(t.numel() for t in weights.values())
    without = f", without {len(original.dropped)} tensors that no encoder uses" if original.dropped else ""
    return f"{original.config.model_type} of {count:,} parameters in transformers' files{without}"


def recognise(content: Any, where: str) -> Original:
    """Recognise the kind of an original checkpoint, and derive its configuration.

    Args:
        content: the result of `read_pickle`. Its tensors may be on the meta device.
        where: the file's name, for error messages.

    Returns:
        The configuration and the tensors to convert, which are not yet renamed.

    Raises:
        ModelError: the checkpoint is of no known kind, lacks an option, or contradicts itself.
    """
    match content:
        case {"dims": dict(dims), "model_state_dict": dict(tensors)}:
            _require_tensors(tensors, where)
            return _whisper(dims, tensors, where)
        case {"model": dict(tensors)} if any(
            "feature_extractor.conv_layers.0.0.weight" in str(name) for name in tensors
        ):
            # Older versions of fairseq write `args`, newer ones `cfg`. In some files, both keys are present,
            # but the value of one is None.
            for options in (plain(content.get("cfg")), plain(content.get("args"))):
                if isinstance(options, dict):
                    _require_tensors(tensors, where)
                    return _waveform(options, tensors, where)
    raise ModelError(
        f"{where} is not a checkpoint of a known kind: neither OpenAI's Whisper (dims, model_state_dict), "
        "nor WavLM or fairseq's HuBERT or wav2vec 2.0 (cfg or args, model), nor SLAM-LLM's model.pt "
        "(encoder_projector.…)."
    )


def map_tensors(original: Original, where: str) -> TensorDict:
    """Rename the tensors, and check that they are exactly those of transformers' model.

    Args:
        original: the result of `recognise`.
        where: the file's name, for error messages.

    Returns:
        The same tensors, with dtypes unchanged, by transformers' names.

    Raises:
        ModelError: a tensor is missing, unexpected, or of another shape; or no model has the sizes in the
            configuration.
    """
    try:
        expected = _skeleton(original.config).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(
            f"{where}: no model has the sizes in its configuration; fetch it again: {one_sentence(error)}"
        ) from error
    mapped: TensorDict = {}
    for name, tensor in original.tensors.items():
        target = name
        for pattern, replacement in original.rules:
            target = re.sub(pattern, replacement, target)
        if target not in expected:
            raise ModelError(f"{where} holds an unknown tensor, {name}: it cannot be converted without loss.")
        if tensor.shape != expected[target].shape:
            raise ModelError(
                f"{where}: {name} is {tuple(tensor.shape)}, but by its configuration it should be "
                f"{tuple(expected[target].shape)}: fetch it again."
            )
        mapped[target] = tensor
    missing = [name for name in expected if name not in mapped]
    if missing:
        raise ModelError(
            f"{where} lacks {len(missing)} tensors, such as the one that becomes {missing[0]}: "
            "fetch it again."
        )
    return mapped


def _require_tensors(tensors: dict[Any, Any], where: str) -> None:
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
            raise ModelError(
                f"{where} holds {name!r} among its weights, which is not a tensor of floats: "
                "it cannot be converted."
            )


def _skeleton(config: PretrainedConfig) -> torch.nn.Module:
    """Build transformers' model on the meta device, which gives names and shapes but needs no memory."""
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False)


def _whisper(dims: dict[str, int], tensors: TensorDict, where: str) -> Original:
    try:
        width = dims["n_audio_state"]
        dropped: list[str] = []
        if width != dims["n_text_state"]:
            dims, tensors, dropped = _without_decoder(dims, tensors)
        config = WhisperConfig(
            num_mel_bins=dims["n_mels"],
            max_source_positions=dims["n_audio_ctx"],
            d_model=width,
            encoder_layers=dims["n_audio_layer"],
            encoder_attention_heads=dims["n_audio_head"],
            encoder_ffn_dim=4 * width,
            vocab_size=dims["n_vocab"],
            max_target_positions=dims["n_text_ctx"],
            decoder_layers=dims["n_text_layer"],
            decoder_attention_heads=dims["n_text_head"],
            decoder_ffn_dim=4 * width,
            # Only the decoder uses these ids. transformers requires that they are below vocab_size.
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
        )
    except KeyError as error:
        raise ModelError(
            f"{where}: its dims lack {error.args[0]}: it is not a checkpoint of OpenAI's Whisper."
        ) from error
    except (TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"{where}: its dims are not sizes, so it is not a checkpoint of OpenAI's Whisper; "
            f"give another: {one_sentence(error)}"
        ) from error
    return Original(config, tensors, _WHISPER, dropped=dropped)


def _without_decoder(
    dims: dict[str, int], tensors: TensorDict
) -> tuple[dict[str, int], TensorDict, list[str]]:
    """Replace a Whisper's decoder by one without layers, because only the encoder is used here.

    transformers' Whisper always has a decoder, which must be as wide as its encoder.

    Returns:
        Sizes and tensors with the new decoder, and the names of the tensors that are dropped.
    """
    width = dims["n_audio_state"]
    dropped = [name for name in tensors if name.startswith("decoder.")]
    encoder = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    dtype = next(iter(encoder.values())).dtype if encoder else torch.float32
    one_row, row = (1, width), (width,)
    shapes = {
        **{"token_embedding.weight": one_row, "positional_embedding": one_row},
        **{"ln.weight": row, "ln.bias": row},
    }
    empty = {f"decoder.{name}": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    sizes = {"n_vocab": 1, "n_text_ctx": 1, "n_text_layer": 0, "n_text_head": dims["n_audio_head"]}
    return dims | sizes, encoder | empty, dropped


def _waveform(content: dict[str, Any], tensors: TensorDict, where: str) -> Original:
    """Read a checkpoint of WavLM, HuBERT or wav2vec 2.0.

    Args:
        content: the configuration in the file, as nested dicts.
        tensors: all tensors of the file, by fairseq's names.
        where: the file's name, for error messages.

    Raises:
        ModelError: the configuration lacks an option, or contradicts the tensors.
    """
    # Names are compared without the prefix, so `_HEADS` also covers what pretraining left in a fine-tuned
    # model.
    dropped = [name for name in tensors if _HEADS.fullmatch(name.removeprefix(_TUNED))]
    encoder = {name.removeprefix(_TUNED): t for name, t in tensors.items() if name not in dropped}
    options = FairseqOptions(content, any(name.startswith(_TUNED) for name in tensors), where)
    normalize = options.normalizes()
    config = waveform_config(encoder, "label_embs_concat" in tensors, options)
    return Original(config, encoder, _WAVEFORM, normalize, dropped)


def _feature_extractor(original: Original) -> Any:
    """Return transformers' feature extractor, which writes preprocessor_config.json."""
    from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    if original.normalize is None:
        return WhisperFeatureExtractor(feature_size=original.config.num_mel_bins)
    # fairseq masks padding only in the models whose convolutions use layer norm.
    masks = original.config.feat_extract_norm == "layer"
    return Wav2Vec2FeatureExtractor(do_normalize=original.normalize, return_attention_mask=masks)
