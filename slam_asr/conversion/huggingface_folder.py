"""Writes a folder that transformers loads by itself, on machines without slam-asr.

The folder holds the trained weights, the processor, and the Python files that `config.json` names: those of
`huggingface/`, and copies of the modules in `_SHARED`. Encoder and LLM are named by config.json, or are in
the subfolders `encoder` and `llm`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from transformers import AutoModel, PreTrainedTokenizerBase, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.utils import SAFE_WEIGHTS_NAME

from slam_asr.artifacts.model_folder import ENCODER, LLM
from slam_asr.config.recipe import Recipe
from slam_asr.conversion.ctc_head import ctc_options, ctc_weight_of
from slam_asr.conversion.huggingface.configuration_slam_asr import SlamAsrConfig
from slam_asr.conversion.huggingface.processing_slam_asr import SlamAsrProcessor
from slam_asr.conversion.model_card import CARD, Report, model_card, usage
from slam_asr.conversion.parts import Parts
from slam_asr.conversion.tuned import write_trained_encoder, write_trained_llm
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.generation import ctc_prefix
from slam_asr.models import feature_dtype, projector
from slam_asr.models.encoders import waveform_batch
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.encoders.waveform import WaveformSpec
from slam_asr.models.encoders.whisper import WhisperSpec
from slam_asr.models.llm import load_llm, load_tokenizer
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import positions_of
from slam_asr.models.prompt import Prompt
from slam_asr.models.searcher import generation_of
from slam_asr.pretrained.lazy_tensors import LazyTensors, lazy_tensors, rename_tensors
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.model_files import weight_files
from slam_asr.progress import log_line
from slam_asr.storage import local_path, write_atomically

_SHARED = (ctc_prefix, feature_dtype, projector, waveform_batch)
"""Modules of slam-asr that need only torch and transformers. An exported folder gets a copy of each, named
NAME_slam_asr.py. In `huggingface/`, a file of that name imports from the module instead, so that the code
there also runs within slam-asr."""
SOURCES = {
    **{source.name: source for source in (Path(__file__).parent / "huggingface").glob("*_slam_asr.py")},
    **{f"{module.__name__.rpartition('.')[2]}_slam_asr.py": Path(str(module.__file__)) for module in _SHARED},
}
"""The files of code that a folder gets, by their names in it."""
AUTO_MAP = {
    "AutoConfig": "configuration_slam_asr.SlamAsrConfig",
    "AutoModelForSpeechSeq2Seq": "modeling_slam_asr.SlamAsrForConditionalGeneration",
    "AutoProcessor": "processing_slam_asr.SlamAsrProcessor",
}
PIPELINE = {"impl": "pipeline_slam_asr.SlamAsrPipeline", "pt": ["AutoModelForSpeechSeq2Seq"]}
_AUDIO_TOKENS = ("<|audio|>", "<|speech|>", "<|slam_asr_audio|>")
"""The audio's token is the first of these that the LLM's tokenizer does not have yet."""
_PROMPT = "\u241eprompt\u241e"
"""Placeholder for the prompt while a template is filled in."""


def write_huggingface(folder: Path, parts: Parts, complete: bool, report: Report | None) -> None:
    """Write the folder; its config.json comes last.

    Args:
        folder: an existing folder.
        parts: the weights.
        complete: whether encoder and LLM are copied into the folder.
        report: the measured error rates, for the model card.

    Raises:
        ConfigurationError: the LLM needs its own Python code.
        ModelError: the LLM's chat template cannot be written for the processor, the processor gives the
            prompt other token ids than the training, or a trained encoder or LLM does not fit the recipe.
    """
    recipe = parts.recipe
    if recipe.llm.trust_remote_code:
        raise ConfigurationError(
            f"{recipe.llm.name} runs its own Python code (llm.trust_remote_code), which --to huggingface "
            "does not export: set --llm.trust_remote_code false if the LLM needs none, or leave out --to."
        )
    spec = describe_encoder(recipe.encoder)
    names = {part: _write_base(folder, parts, complete, part) for part in (ENCODER, LLM)}
    weights = {f"projector.{n}": t for n, t in parts.projector.state_dict().items()}
    # `default` is the name that peft gives to an adapter in memory; its files omit it.
    weights |= {"llm." + n.replace(".default.", "."): t for n, t in parts.adapter.items()}
    # safetensors refuses tensors that are not contiguous.
    tensors = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    write_atomically(folder / SAFE_WEIGHTS_NAME, save(tensors, {"format": "pt"}))
    for name, source in SOURCES.items():
        shutil.copy(source, folder / name)
    tokenizer = load_tokenizer(locate_model(recipe.llm.name))
    prompt = Prompt(tokenizer, recipe.llm)
    processor = _processor(spec, tokenizer, prompt, recipe)
    processor.save_pretrained(folder)
    _require_same_prompt(folder, spec, prompt, recipe)
    _name_code(folder / "processor_config.json")
    generation_of(recipe.decoding, prompt).save_pretrained(folder)
    weight = ctc_weight_of(parts)
    write_atomically(folder / CARD, model_card(parts.content, usage(names, weight), report, weight))
    _config(parts, names, processor.audio_token_id).save_pretrained(folder)
    log_line(f"{folder}: load it with AutoModelForSpeechSeq2Seq and trust_remote_code=True")


def read_trained(folder: Path) -> LazyTensors:
    """Read the weights of projector and adapter in a written folder.

    Returns:
        The weights by the names that they have in a checkpoint, `projector.…` and `llm.…`.
    """
    tensors = lazy_tensors([folder / SAFE_WEIGHTS_NAME])
    adapter = {n.replace(".weight", ".default.weight"): n for n in tensors if n.startswith("llm.")}
    return rename_tensors(tensors, {n: n for n in tensors if n.startswith("projector.")} | adapter)


def _write_base(folder: Path, parts: Parts, complete: bool, part: str) -> str | None:
    """Write the encoder or the LLM into its subfolder if it belongs there.

    Returns:
        The model's name; None if the model is in the subfolder.
    """
    name = parts.recipe.encoder.name if part == ENCODER else parts.recipe.llm.name
    if part == ENCODER and parts.encoder:
        write_trained_encoder(folder / ENCODER, parts)
    elif part == LLM and parts.llm and not parts.adapter:
        write_trained_llm(folder / LLM, parts)
    elif complete:
        _copy_base(locate_model(name), folder / part, part)
    else:
        if local_path(name).exists() or name.startswith("s3://"):
            log_line(
                f"config.json names the {part} by an address that other machines may not have, {name}: load "
                f"the model there with {part}_name=…, or convert it again with --{part}.name and the name on "
                "the hub, or with --complete true"
            )
        return name
    return None


def _copy_base(base: Path, folder: Path, part: str) -> None:
    """Copy the base encoder or LLM into a folder."""
    folder.mkdir(exist_ok=True)
    files = weight_files(base)
    if all(file.suffix == ".safetensors" for file in files):
        for file in [*files, *base.glob("*.index.json"), base / "config.json"]:
            shutil.copy(file, folder)
    # Pickles are written again as safetensors, which run no code when they are loaded.
    elif part == ENCODER:
        load_weights(AutoModel, base, torch.float32, "encoder").save_pretrained(folder)
    else:
        load_llm(base, torch.float32).save_pretrained(folder)


def _config(parts: Parts, names: dict[str, str | None], audio_token_id: int) -> SlamAsrConfig:
    recipe = parts.recipe
    frozen = recipe.encoder.tuning == "frozen"
    lora = recipe.llm.lora
    keys = ("kind", "downsampling", "hidden", "queries", "layers")
    return SlamAsrConfig(
        encoder_name=names["encoder"],
        llm_name=names["llm"],
        encoder_width=parts.widths[0],
        llm_width=parts.widths[1],
        projector={key: getattr(recipe.projector, key) for key in keys},
        frames=recipe.encoder.frames,
        long_audio=recipe.encoder.long_audio,
        feature_dtype=recipe.features.dtype if frozen else "fp32",
        lora_scale=lora.alpha / lora.rank if parts.adapter else None,
        audio_token_id=audio_token_id,
        **ctc_options(parts),
        dtype=DTYPES[recipe.decoding.precision],
        architectures=["SlamAsrForConditionalGeneration"],
        auto_map=AUTO_MAP,
        custom_pipelines={"automatic-speech-recognition": PIPELINE},
    )


def _processor(
    spec: EncoderSpec, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, recipe: Recipe
) -> SlamAsrProcessor:
    """Build the processor. It takes over the tokenizer, which is changed."""
    audio, template = add_audio_token(tokenizer, prompt, recipe)
    # Otherwise, transformers would use the LLM's own template, which does not place the audio.
    tokenizer.chat_template = None
    if isinstance(spec, WhisperSpec):
        extractor: Any = WhisperFeatureExtractor(
            feature_size=spec.config.num_mel_bins, chunk_length=spec.window_samples // 16_000
        )
    else:
        # The processor normalises waveforms by itself, with fairseq's epsilon.
        extractor = Wav2Vec2FeatureExtractor(do_normalize=False)
    projector = recipe.projector
    return SlamAsrProcessor(
        extractor,
        tokenizer,
        chat_template=template,
        audio_token=audio,
        default_transcription_prompt=recipe.llm.prompt,
        add_special_tokens=not prompt.chat,
        positions={
            "downsampling": projector.downsampling,
            "queries": projector.queries if projector.kind == "q-former" else 0,
            "frames": recipe.encoder.frames,
            "long_audio": recipe.encoder.long_audio,
        },
        normalize=isinstance(spec, WaveformSpec) and spec.normalize,
    )


def add_audio_token(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    recipe: Recipe,
    positions: int = 1,
    bos: str = "",
    embeddings: int | None = None,
) -> tuple[str, str]:
    """Add a token for the audio to a tokenizer, and let it pad on the left.

    Args:
        tokenizer: the LLM's tokenizer.
        prompt: the recipe's prompts, tokenised with `tokenizer`.
        recipe: contains the prompt and its template.
        positions: number of times that the template writes the token.
        bos: text that the template writes before the first piece of text.
        embeddings: number of the LLM's embeddings, if the audio's token needs one. If none is free, the token
            is a special token that the prompt does not use.

    Returns:
        The token; and a Jinja template that turns a conversation of one turn into the text used in training.

    Raises:
        ModelError: the LLM's chat template changes prompts in a way that is not known here, or the LLM has
            no token to spare.
    """
    audio = next(token for token in _AUDIO_TOKENS if token not in tokenizer.get_vocab())
    if embeddings is not None and len(tokenizer) >= embeddings:
        # A new token would need one more embedding than the LLM has, so an existing token is used instead.
        audio = _unused_token(tokenizer, prompt, recipe, embeddings)
    before, after = _texts_in_jinja(prompt, recipe, bos)
    if audio not in tokenizer.get_vocab():
        tokenizer.add_tokens([audio], special_tokens=True)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(prompt.end)
    # An answer follows the last position, so padding on the right would be between prompt and answer.
    tokenizer.padding_side = "left"
    return audio, (
        '{%- for message in messages if message.role == "user" -%}'
        "{%- set prompt = message.content if message.content is string else message.content "
        '| selectattr("type", "equalto", "text") | map(attribute="text") | join("") -%}'
        f"{before}{{{{- {json.dumps(audio)} * {positions} -}}}}{after}"
        "{%- endfor -%}"
    )


def _unused_token(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, recipe: Recipe, embeddings: int) -> str:
    """Return a special token that has an embedding and that the prompt does not use.

    Raises:
        ModelError: the tokenizer has none.
    """
    used = {*prompt.main.before, *prompt.main.ids, *prompt.stops, tokenizer.bos_token_id}
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special and i < embeddings and i not in used:
            return token.content
    raise ModelError(
        f"{recipe.llm.name} has no unused special token that could mark the audio's positions: use "
        "--to huggingface."
    )


def _texts_in_jinja(prompt: Prompt, recipe: Recipe, bos: str) -> tuple[str, str]:
    """Return Jinja expressions for the texts before and after the audio; they read the variable `prompt`.

    Raises:
        ModelError: the LLM's chat template changes prompts in a way that is not known here.
    """
    texts = prompt.texts_around_audio(_PROMPT, recipe.llm.template)
    expected = prompt.texts_around_audio(recipe.llm.prompt, recipe.llm.template)
    # Some chat templates strip the user's text.
    values = {"prompt": recipe.llm.prompt, "prompt | trim": recipe.llm.prompt.strip()}
    fitting = [n for n, v in values.items() if tuple(t.replace(_PROMPT, v) for t in texts) == expected]
    if not fitting:
        raise ModelError(
            f"The chat template of {recipe.llm.name} changes the prompt {recipe.llm.prompt!r}, so it cannot "
            "be written for the processor: leave out --to."
        )
    texts = (bos + texts[0], texts[1]) if texts[0] else ("", bos + texts[1])
    # JSON escapes quotes and line ends in the way that Jinja reads.
    before, after = (
        f"{{{{- {fitting[0]} -}}}}".join(f"{{{{- {json.dumps(t, ensure_ascii=False)} -}}}}" for t in pieces)
        for pieces in (text.split(_PROMPT) for text in texts)
    )
    return before, after


def _require_same_prompt(folder: Path, spec: EncoderSpec, prompt: Prompt, recipe: Recipe) -> None:
    """Read the processor again, and require the token ids that the model was trained with.

    Raises:
        ModelError: the processor's token ids differ.
    """
    processor = SlamAsrProcessor.from_pretrained(folder, trust_remote_code=False)
    samples = 16_000
    inputs = processor.apply_transcription_request(np.zeros(samples, np.float32))
    ids = inputs["input_ids"][0].tolist()
    audio = [processor.audio_token_id] * positions_of(recipe.projector, spec.span_of(samples))
    if ids != [*prompt.main.before, *audio, *prompt.main.ids]:
        raise ModelError(
            f"The processor in {folder} gives the prompt other token ids than the training with "
            f"{recipe.llm.name}. Nothing is published; please report this."
        )


def _name_code(file: Path) -> None:
    """Name the processor's code in its configuration."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    write_atomically(file, json.dumps(values, indent=2, ensure_ascii=False))
