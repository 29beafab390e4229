"""Writes a model as transformers' own class Voxtral, so that its folder contains no code.

Voxtral consists of a Whisper encoder, a projector without biases, and an LLM. The projector's sizes follow
from the other two parts. A linear projector is rewritten to that form without changing what it computes:

- Voxtral joins k frames per position if the encoder's feed-forward layers are k times as wide as a frame. So
  these layers, usually 4 times as wide, are padded to k times, with zeros on both sides of the activation.
- The encoder ends with a LayerNorm, y = γ · n + β, whose n has mean 0. Therefore Σ (yᵢ - βᵢ) / γᵢ = 0, and
  Σ yᵢ / γᵢ is the constant c = Σ βᵢ / γᵢ. So the weights 1 / (k · c · γᵢ) give 1 for any k frames, and these
  weights times the first layer's bias replace the bias.
- A spare hidden unit computes this 1, and its weights in the second layer are the second bias. ReLU leaves
  the 1 unchanged. All other spare units are 0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import (
    PreTrainedModel,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from slam_asr.artifacts.model_folder import CONFIG
from slam_asr.config.recipe import Recipe
from slam_asr.conversion.huggingface_folder import add_audio_token
from slam_asr.conversion.model_card import CARD, Report, model_card
from slam_asr.conversion.parts import Parts
from slam_asr.conversion.tuned import load_trained_encoder, load_trained_llm
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.encoders.whisper import WhisperSpec
from slam_asr.models.llm import describe_llm, load_tokenizer
from slam_asr.models.projector import LinearProjector
from slam_asr.models.prompt import Prompt
from slam_asr.models.searcher import generation_of
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.locate import locate_model
from slam_asr.progress import log_line
from slam_asr.storage import write_atomically

TOLERANCE = 1e-4
"""Difference of the logits that rounding may cause, as a share of the largest logit."""
SMALLEST_CONSTANT = 1e-3
"""Share of Σ |βᵢ / γᵢ| below which c would be lost in rounding."""


def write_voxtral(folder: Path, parts: Parts, report: Report | None) -> str:
    """Write the folder, with all weights in fp32, and compare its logits with those of the three parts.

    Args:
        folder: an existing folder. If the logits differ, its config.json is removed, so that it is no model.
        parts: the weights.
        report: the measured error rates, for the model card.

    Returns:
        A clause for the stage's summary that states what was compared.

    Raises:
        ConfigurationError: the model does not meet a condition; the message names it.
        ModelError: the prompt cannot be written as a chat template, the LLM has no unused special token for
            the audio, the prompt's token ids differ from those in training, or the logits differ.
    """
    spec, recipe = _require_conditions(parts), parts.recipe
    prompt = Prompt(tokenizer := load_tokenizer(locate_model(recipe.llm.name)), recipe.llm)
    positions = spec.window_frames // recipe.projector.downsampling
    ids, audio_id = _prepare_tokenizer(tokenizer, prompt, recipe, positions)
    _, encoder = load_trained_encoder(spec, parts, torch.float32)
    llm = load_trained_llm(parts, torch.float32)
    projector = parts.projector
    assert isinstance(projector, LinearProjector), "_require_conditions has checked it"
    weights = _pad_tower(encoder, recipe) | _rewrite_projector(projector, encoder.layer_norm, parts)
    weights |= _llm_weights(llm)
    config = _config(encoder, llm, recipe, audio_id)
    _require_same_shapes(weights, config, recipe)
    expected = _logits(encoder, projector, llm, ids, audio_id)
    del llm
    # The tensors are copied, because safetensors refuses tied weights that share memory.
    tensors = {name: tensor.detach().float().clone() for name, tensor in weights.items()}
    save_file(tensors, folder / SAFE_WEIGHTS_NAME, {"format": "pt"})
    del weights, tensors
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(
        feature_size=spec.config.num_mel_bins, chunk_length=spec.window_samples // 16_000
    ).save_pretrained(folder)
    generation = generation_of(recipe.decoding, prompt)
    if generation.repetition_penalty != 1.0:
        log_line(
            f"decoding.repetition_penalty ({generation.repetition_penalty}) is left out: transformers would "
            "apply it to Voxtral's prompt too, so answers may differ from those of decode"
        )
        generation.repetition_penalty = 1.0
    generation.save_pretrained(folder)
    write_atomically(folder / CARD, model_card(parts.content, _usage(recipe), report))
    config.save_pretrained(folder)
    return _compare(folder, encoder.config, ids, expected)


def _require_conditions(parts: Parts) -> WhisperSpec:
    """Return the encoder's description if the model can be rewritten.

    Raises:
        ConfigurationError: the model does not meet a condition; the message names it.
    """
    recipe = parts.recipe
    spec, projector = describe_encoder(recipe.encoder), recipe.projector
    k, frames = projector.downsampling, recipe.encoder.frames
    conditions = {
        f"a Whisper encoder (encoder.name is {recipe.encoder.name})": isinstance(spec, WhisperSpec),
        f"all frames of the window (encoder.frames is {frames})": frames == "all",
        "one window per utterance (encoder.long_audio is split)": recipe.encoder.long_audio != "split",
        f"a linear projector (projector.kind is {projector.kind})": projector.kind == "linear",
        f"at least 4 frames per position (projector.downsampling is {k})": k >= 4,
        f"a hidden width of the projector (projector.hidden, {projector.hidden}) below the LLM's "
        f"({parts.widths[1]})": projector.hidden < parts.widths[1],
        f"an LLM that reads every position (projector.drop_blanks is {projector.drop_blanks})": (
            not projector.drop_blanks
        ),
        "no Python code of the LLM (llm.trust_remote_code is true)": not recipe.llm.trust_remote_code,
    }
    if isinstance(spec, WhisperSpec):
        conditions |= {
            f"a window of {spec.window_frames} frames that projector.downsampling ({k}) divides": (
                spec.window_frames % k == 0
            ),
            f"feed-forward layers of at most {k} times the encoder's width": (
                spec.config.encoder_ffn_dim <= k * spec.width
            ),
        }
    unmet = next((condition for condition, met in conditions.items() if not met), None)
    if unmet or not isinstance(spec, WhisperSpec):
        raise ConfigurationError(
            f"{parts.where} cannot become a Voxtral, which needs {unmet}: use --to huggingface."
        )
    return spec


def _prepare_tokenizer(
    tokenizer: Any, prompt: Prompt, recipe: Recipe, positions: int
) -> tuple[list[int], int]:
    """Let the tokenizer's chat template write the prompt of the training, with the audio's tokens in it.

    Returns:
        Token ids of the prompt, and the audio's token id.

    Raises:
        ModelError: the tokenizer gives the text other token ids if the audio's tokens are in it; or as for
            `add_audio_token`.
    """
    # `apply_chat_template` adds no bos, so the template must write it if the tokenizer would add it.
    adds_bos = not prompt.chat and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    llm: Any = describe_llm(locate_model(recipe.llm.name))
    audio, template = add_audio_token(
        tokenizer,
        prompt,
        recipe,
        positions,
        bos=tokenizer.bos_token if adds_bos else "",
        embeddings=llm.get_input_embeddings().num_embeddings,
    )
    tokenizer.chat_template = template
    audio_id = tokenizer.convert_tokens_to_ids(audio)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": recipe.llm.prompt}], tokenize=True, return_dict=True
    )["input_ids"]
    if ids != [*prompt.main.before, *[audio_id] * positions, *prompt.main.ids]:
        raise ModelError(
            f"The tokenizer of {recipe.llm.name} gives the prompt other token ids if the audio is in the "
            "same text, so the model cannot become a Voxtral: use --to huggingface."
        )
    return ids, audio_id


def _pad_tower(encoder: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return Voxtral's weights of the encoder: its feed-forward layers get k times the width, with zeros."""
    missing = recipe.projector.downsampling * encoder.config.d_model - encoder.config.encoder_ffn_dim
    paddings = {".fc1.weight": (0, 0, 0, missing), ".fc1.bias": (0, missing), ".fc2.weight": (0, missing)}
    weights = {}
    for name, tensor in encoder.state_dict().items():
        padding = next((p for end, p in paddings.items() if name.endswith(end)), (0, 0))
        weights[f"model.audio_tower.{name}"] = functional.pad(tensor, padding)
    return weights


def _rewrite_projector(
    projector: LinearProjector, norm: torch.nn.LayerNorm, parts: Parts
) -> dict[str, torch.Tensor]:
    """Return the weights of Voxtral's two layers, which have no biases.

    Args:
        projector: maps k frames of d values to h hidden values, and these to LLM width D.
        norm: the encoder's last layer, which gives γ and β.
        parts: the model, for the error message.

    Returns:
        The first layer's weight [D, k · d], and the second's [D, D].

    Raises:
        ConfigurationError: the constant c is too small.
    """
    gamma, beta = norm.weight.double(), norm.bias.double()
    ratios = beta / gamma
    constant = ratios.sum()
    if not bool(constant.abs() > SMALLEST_CONSTANT * ratios.abs().sum()):
        raise ConfigurationError(
            f"{parts.where} cannot become a Voxtral, which needs a last LayerNorm of the encoder whose β / γ "
            "do not add up to zero: use --to huggingface."
        )
    k = projector.downsampling
    ones = (1 / gamma / constant / k).repeat(k)  # [k · d]: gives 1 for any k frames
    first, second = projector.linear1, projector.linear2
    hidden, width = len(first.bias), len(second.bias)
    rows = first.weight.double() + torch.outer(first.bias.double(), ones)
    linear_1 = torch.cat([rows, ones[None], ones.new_zeros(width - hidden - 1, len(ones))])
    linear_2 = torch.zeros(width, width)
    linear_2[:, :hidden], linear_2[:, hidden] = second.weight, second.bias
    return {
        "model.multi_modal_projector.linear_1.weight": linear_1,
        "model.multi_modal_projector.linear_2.weight": linear_2,
    }


def _llm_weights(llm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the LLM's weights under the names that they have in Voxtral."""
    base = getattr(llm, llm.base_model_prefix)
    weights = {f"model.language_model.{name}": tensor for name, tensor in base.state_dict().items()}
    head = llm.get_output_embeddings()
    return weights | {f"lm_head.{name}": tensor for name, tensor in head.state_dict().items()}


def _config(encoder: Any, llm: PreTrainedModel, recipe: Recipe, audio_id: int) -> VoxtralConfig:
    whisper = encoder.config
    copied = ("d_model", "encoder_layers", "encoder_attention_heads", "num_mel_bins", "max_source_positions")
    audio = {name: getattr(whisper, name) for name in (*copied, "activation_function", "scale_embedding")}
    audio |= {
        "model_type": "voxtral_encoder",
        "encoder_ffn_dim": recipe.projector.downsampling * whisper.d_model,
        "vocab_size": whisper.vocab_size,
    }
    return VoxtralConfig(
        audio_config=audio,
        text_config=llm.config.to_dict(),
        audio_token_id=audio_id,
        projector_hidden_act="relu",
        dtype=torch.float32,
        architectures=["VoxtralForConditionalGeneration"],
    )


def _require_same_shapes(weights: Mapping[str, torch.Tensor], config: VoxtralConfig, recipe: Recipe) -> None:
    """Require that Voxtral with this LLM has weights of exactly these names and shapes.

    Raises:
        ConfigurationError: a name or a shape differs.
    """
    with torch.device("meta"):
        model = VoxtralForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    actual = {name: tensor.shape for name, tensor in weights.items()}
    if differing := sorted(n for n in expected | actual if expected.get(n) != actual.get(n)):
        raise ConfigurationError(
            f"{recipe.llm.name} cannot be the LLM of a Voxtral, because it is not just a decoder and a "
            f"linear output layer without bias ({differing[0]} differs): use --to huggingface."
        )


def _probe(config: Any) -> torch.Tensor:
    """Return a random spectrogram of one window [1, bins, columns]."""
    generator = torch.Generator().manual_seed(0)
    columns = 2 * config.max_source_positions
    return torch.randn(1, config.num_mel_bins, columns, generator=generator)


@torch.inference_mode()
def _logits(
    encoder: Any, projector: LinearProjector, llm: PreTrainedModel, ids: list[int], audio_id: int
) -> torch.Tensor:
    """Return the logits [vocabulary] that the three parts compute for the first answer token on the probe."""
    frames = encoder(_probe(encoder.config)).last_hidden_state[0]
    tokens = torch.tensor([ids])
    is_audio = tokens == audio_id
    embeddings = llm.get_input_embeddings()(tokens.masked_fill(is_audio, 0))
    embeddings = embeddings.masked_scatter(is_audio.unsqueeze(-1), projector([frames]))
    output: Any = llm(inputs_embeds=embeddings)
    return output.logits[0, -1]


@torch.inference_mode()
def _compare(folder: Path, config: Any, ids: list[int], expected: torch.Tensor) -> str:
    """Load the written folder, and compare its logits with those of the three parts.

    Raises:
        ModelError: the logits differ. The folder's config.json has been removed, so that it is no model.
    """
    model = load_weights(VoxtralForConditionalGeneration, folder, torch.float32, "LLM")
    output: Any = model(input_ids=torch.tensor([ids]), input_features=_probe(config))
    difference = float((output.logits[0, -1] - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        (folder / CONFIG).unlink()
        raise ModelError(
            f"{folder} does not compute what the checkpoint computes: its logits differ by {difference:.1g} "
            "of the largest. Nothing is published; use --to huggingface, and please report this."
        )
    return f"logits on random audio differ by at most {difference:.1g} of the largest"


def _usage(recipe: Recipe) -> str:
    prompt = recipe.llm.prompt
    return f"""## Use with transformers

```python
from transformers import AutoModelForMultimodalLM, AutoTokenizer, WhisperFeatureExtractor
from transformers.audio_utils import load_audio

model = AutoModelForMultimodalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
extractor = WhisperFeatureExtractor.from_pretrained("FOLDER")
audio = load_audio("recording.wav", sampling_rate=16_000)  # of up to 30 s
turns = [{{"role": "user", "content": {prompt!r}}}]
inputs = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")
features = extractor(audio, sampling_rate=16_000, return_tensors="pt")["input_features"]
answer = model.generate(**inputs, input_features=features)[:, inputs["input_ids"].shape[1] :]
print(tokenizer.batch_decode(answer, skip_special_tokens=True))
```"""
