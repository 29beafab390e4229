"""Recipes: everything that decides what is trained and measured, typed and documented.

A recipe is a YAML file. The ones that ship are in `slam_asr/recipes/` and are named by their file name
without `.yaml`; any other is named by its path. The dataclasses below are the schema, and the docstring
below each field is its help text. An unknown key, a value of the wrong type and a combination that
cannot work are refused before any data or model is loaded, in a sentence that names the key. The command line
can override every key: `--training.max_steps 200`.
"""

import math
import operator
import os
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from slam_asr.config.deepspeed import adopt
from slam_asr.config.schema import keys_of, nearest, parse_yaml, typed
from slam_asr.errors import ConfigurationError
from slam_asr.storage import is_s3, read_bytes


@dataclass
class Columns:
    """Names of a table's columns. A column left empty is looked up by its usual names."""

    audio: str = ""
    """The audio file, or the audio itself. Usual names: audio, path, file, wav, file_name and similar."""
    text: str = ""
    """The transcript. Usual names: text, sentence, transcript, transcription, target."""
    key: str = ""
    """A unique name for each utterance. Usual names: id, key, utt_id; without such a column, the audio file's
    path."""
    split: str = ""
    """The subset, which the patterns of train, dev and test are matched against. Usual names: split, subset;
    without such a column, the table's file name."""
    speaker: str = ""
    """The speaker. Usual names: speaker, speaker_id, client_id."""
    start: str = ""
    """Seconds into the file where an utterance begins, for tables whose rows are segments of longer files.
    Used only if named here."""
    duration: str = ""
    """Length of a segment in seconds. If not named, a segment ends with its file."""


@dataclass
class Data:
    """Which utterances to use, and how to write their transcripts."""

    kind: Literal["auto", "librispeech", "table", "folder", "jsonlines", "kaldi", "lhotse", "huggingface"] = (
        "auto"
    )
    """Layout of the corpus; `auto` detects it from the files."""
    train: list[str] = field(default_factory=lambda: ["train-*"])
    """Subsets of the corpus to train on; shell patterns are allowed. `[]`: none, if only a trained model is
    measured."""
    dev: list[str] = field(default_factory=lambda: ["dev-other"])
    """Subsets to validate on during training. If the corpus has none of them, `dev_fraction` of the train
    utterances is held out instead."""
    test: list[str] = field(default_factory=lambda: ["test-*"])
    """Subsets to decode and score, each reported separately."""
    dev_fraction: float = 0.05
    """Share of the train utterances held out for validation if the corpus has no dev subset. A hash of the
    key decides, so the same utterances are held out every time."""
    columns: Columns = field(default_factory=Columns)
    audio_root: str = ""
    """Folder or s3:// prefix that relative audio paths in a table, list or cuts file start from. Default: the
    folder of that file."""
    text: Literal["lower", "upper", "as-is", "whisper"] = "lower"
    """How transcripts are written: in lower or upper case, unchanged, or after Whisper's normaliser for
    English, which expands contractions and removes punctuation. LLMs need fewer tokens for lower case. A
    model and its test set must agree."""
    min_duration: float = 0.1
    """Seconds; shorter utterances are rejected."""
    max_duration: float = 30.0
    """Seconds; longer utterances are rejected. Whisper's window is 30 s."""
    max_rejected: float = 0.05
    """Share of rejected utterances (unreadable, too short, without text …) above which the stage fails,
    because the corpus or the recipe is then probably wrong."""


@dataclass
class Encoder:
    """The speech encoder."""

    name: str = "openai/whisper-tiny.en"
    """A Whisper, WavLM, HuBERT or wav2vec 2.0 encoder: a name on the model hub, a folder or s3:// prefix
    with transformers' files, or an original checkpoint file (OpenAI's Whisper, Microsoft's WavLM, fairseq's
    HuBERT and wav2vec 2.0)."""
    frames: Literal["all", "speech"] = "all"
    """How much of Whisper's output is used. `all`: its complete 30-s window, as in the training of the
    published models; at projector.downsampling 5, that is 300 audio positions. `speech`: only the frames of
    the audio itself, ceil(samples / 320), which trains several times faster. The other encoders have no
    window; their output is as long as the audio."""
    long_audio: Literal["cut", "split", "set-aside"] = "cut"
    """What happens to audio longer than Whisper's window, if `data.max_duration` allows it. `cut`: the audio
    is cut there but its transcript is not, as in the reference implementation. `split`: it is split into
    windows whose frames are joined. `set-aside`: it is excluded from training and decoding, and counted."""
    batch_seconds: float = 240.0
    """Seconds of audio in one batch of the encoder, including padding: every utterance counts as if it were
    as long as the longest of its batch, and with Whisper as complete windows of 30 s. More uses a GPU better
    but takes more memory."""
    tuning: Literal["frozen", "full"] = "frozen"
    """`full` trains the encoder too. Its outputs then change at every step, so they cannot be cached and each
    step encodes its audio."""
    learning_rate: float | None = None
    """Peak of the encoder's own learning rate if it is trained. Default: training.learning_rate."""


@dataclass
class Features:
    """The cache of encoder outputs."""

    cache: Literal["store", "none"] = "store"
    """`store` computes the frozen encoder's outputs once and caches them. `none` (or `features: none` for the
    complete section) encodes on the fly in training and decoding: the same numbers and no storage, but the
    encoder runs again in every epoch."""
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] = "bf16"
    """Number format of cached features. bf16 takes half of fp32's space, and training computes in bf16
    anyway; fp8, with one scale per frame, halves it again."""
    shard_megabytes: int = 512
    """Maximum size of a shard. Smaller shards lose less work when extraction is interrupted; larger ones mean
    fewer objects in the store."""
    window_shards: int = 8
    """Shards whose utterances are shuffled together in training: a window. More shards mix the utterances
    better but take more local disk, which must hold two windows at once."""
    cache_gigabytes: float = 50.0
    """Local disk on each machine for shards fetched from object storage; the least recently used are deleted
    first."""
    parts: int = 1
    """Work shards that the pipeline divides extraction into. Each is a step that can run on any node. More
    work shards than feature shards have no use."""
    processes: int = 0
    """Processes that extract on one machine, one per GPU. 0: as many as there are GPUs, or one on a CPU."""
    workers: int = 0
    """Processes per extracting process that read and prepare audio. 0: the free cores, 16 at most."""


@dataclass
class Projector:
    """The trained part between the encoder and the LLM."""

    kind: Literal["linear", "cov1d-linear", "q-former"] = "linear"
    """`linear` is the published architecture: k neighbouring frames are concatenated, then Linear, ReLU,
    Linear. `cov1d-linear` applies a convolution over k frames first. `q-former` turns audio of any length
    into a fixed number of positions."""
    downsampling: int = 5
    """k: encoder frames joined into one LLM position. 5 gives 10 positions per second; more is faster but
    blurs short words."""
    hidden: int = 2048
    """Width between the two linear layers. A q-former ignores it."""
    queries: int = 64
    """LLM positions that a q-former outputs, whatever the length of the audio. The other kinds ignore it."""
    layers: int = 8
    """Layers of a q-former. The other kinds ignore it."""
    init_from: str = ""
    """A model folder, local or s3://, or the name of a shipped model: training starts from its projector,
    which must have the same kind and sizes. Empty: random weights, drawn with the seed."""


@dataclass
class Lora:
    """Low-rank adapters on the LLM, used if `llm.tuning` is `lora`."""

    rank: int = 8
    """r: width of the bottleneck. More can learn more but takes more memory."""
    alpha: float = 32
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Share of the adapter's inputs that is dropped in training."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get an adapter."""


@dataclass
class Llm:
    """The language model."""

    name: str = "lmsys/vicuna-7b-v1.5"
    """Any causal LM of transformers: a name on the model hub, or a folder or s3:// prefix with its files."""
    prompt: str = "Transcribe speech to text. "
    """The instruction to the LLM. A space at its end is part of it."""
    training_prompts: list[str] = field(default_factory=list)
    """Prompts drawn at random in training, one per utterance and epoch; validation and decoding use `prompt`.
    Empty: always `prompt`."""
    template: str = "USER: {}\n ASSISTANT:"
    """The text around the prompt, which replaces `{}`. The audio comes before all of it, or replaces
    `{audio}`. `chat`: the model's own chat template, with the audio at the start of the user's turn."""
    tuning: Literal["frozen", "lora", "full"] = "frozen"
    """Which of the LLM's weights are trained: none, low-rank adapters, or all."""
    learning_rate: float | None = None
    """Peak of the LLM's own learning rate if it is trained. Default: training.learning_rate."""
    lora: Lora = field(default_factory=Lora)


@dataclass
class Training:
    """How the projector is trained."""

    engine: Literal["deepspeed", "ddp", "fsdp"] = "deepspeed"
    """What distributes the training over processes: DeepSpeed; PyTorch's DDP, where each process holds the
    complete model; or PyTorch's FSDP2, where each holds a part. All take the same steps."""
    nodes: int = 1
    """Machines to train on. With more than one, the pipeline's step `train` starts them as a TrainJob of
    Kubeflow Trainer."""
    processes: int = 0
    """Processes on each machine, one per GPU. 0: as many as there are GPUs, or one on a CPU."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the frozen weights and of the forward and backward passes. The projector's master
    weights are always fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage. 0 is fastest if the LLM fits on one GPU; 3 shards the frozen LLM too. The other
    engines ignore it."""
    deepspeed: dict[str, Any] | str = field(default_factory=dict)
    """DeepSpeed's own JSON, or a path to it. Values that have a recipe key are moved to that key, and all
    others are passed on to DeepSpeed; contradictions are refused."""
    offload_optimizer: bool = False
    """Keep the optimiser's state (12 bytes per trained weight) in host memory and step there, which saves GPU
    memory but is slower. Needs ZeRO stage 1, 2 or 3."""
    gradient_checkpointing: bool = False
    """Save only each LLM layer's input and recompute the layer in the backward pass: a fraction of the
    memory, but a third more time."""
    compile: bool = False
    """Let torch.compile fuse the operations of each LLM layer. Needs a C++ compiler on the training machine,
    and the first steps wait for compilation. Does not work with ZeRO stage 3."""
    liger: bool = False
    """Use Liger's kernels for the LLM's norms, rotary embeddings and feed-forward layers. Needs a GPU and the
    package liger-kernel."""
    epochs: int = 3
    """Passes over the train utterances; `max_steps` may end training earlier."""
    max_steps: int = 100_000
    """Maximum number of optimiser steps."""
    positions_per_step: int = 6000
    """LLM positions (audio, prompt and answer) in one optimiser step, summed over all processes, so the steps
    are the same for any number of processes."""
    positions_per_batch: int = 6000
    """LLM positions that one process puts through the LLM at once. Fewer take less memory; gradients are
    accumulated until the step is complete."""
    packing: bool = True
    """Put the utterances of a batch one after another in one row, so that nothing is padded, if the LLM can
    keep them apart. With `false`, or if the LLM cannot, each utterance gets a row, padded to the longest."""
    utterances_per_batch: int = 0
    """Utterances that one process puts through the LLM at once, as in the reference implementation, instead
    of batches by positions. A step then has utterances_per_batch × `accumulation` × processes utterances, so
    it depends on the number of processes. 0: batches by positions."""
    accumulation: int = 1
    """Batches of `utterances_per_batch` whose gradients each process accumulates in one step."""
    learning_rate: float = 1e-4
    """Peak of AdamW's learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant as in the publication, or down to zero at the last step."""
    gradient_clipping: float = 0.0
    """Maximum norm of the gradient; 0: no clipping."""
    validate_every: int = 1000
    """Steps between validations on dev. Training always ends with one."""
    samples: int = 8
    """Dev utterances that each validation transcribes (greedily), always the same ones. They give an early
    word error rate, and texts to look at. 0: none."""
    trackers: list[str] = field(default_factory=list)
    """Trackers that the numbers are sent to (mlflow, wandb), in addition to the log, curve.jsonl and
    TensorBoard's files. You provide their packages and accounts."""
    patience: int = 0
    """Validations without a lower dev loss after which training ends early; 0: never."""
    nonfinite_steps: int = 3
    """Training stops after this many consecutive steps with a loss or gradient that is not finite. Each such
    step is skipped, and its utterances are written to nonfinite.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0: by time alone. Training also saves one at its end and at each validation
    with the lowest dev loss so far."""
    checkpoint_minutes: float = 15.0
    """Maximum minutes between checkpoints, so that little work is lost when steps are slow; 0: by steps
    alone."""
    checkpoints: int = 2
    """Number of most recent checkpoints to retain. The one with the lowest dev loss is retained in addition.
    """
    log_every: int = 10
    """Steps between two lines of the log."""
    seed: int = 0
    """Seed of the projector's initial weights and of the order of the utterances."""


@dataclass
class Decoding:
    """How test utterances are transcribed and scored."""

    checkpoint: Literal["latest", "best", "average"] = "latest"
    """Which of a training's checkpoints the pipeline turns into a model: the one of the last step, the one
    with the lowest dev loss, or the mean of all retained ones (training.checkpoints)."""
    beams: int = 4
    """Hypotheses that beam search retains at each token; 1 is greedy search, the fastest. More beams can find
    better answers but take more memory and time."""
    nbest: int = 1
    """Answers per utterance that are written to nbest.jsonl with their scores, best first. Must not exceed
    beams."""
    max_new_tokens: int = 200
    """Maximum number of tokens in an answer; longer answers are cut."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the answer already contains become less likely, which prevents loops."""
    length_penalty: float = 1.0
    """Exponent of the length in a beam's score; above 1 favours longer answers."""
    positions_per_batch: int = 20_000
    """LLM positions (audio, prompt and max_new_tokens, times beams) decoded at once. More uses a GPU better
    but takes more memory."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of decoding."""
    parts: int = 1
    """Work shards that the pipeline divides decoding into. Each is a step that can run on any node. The
    transcripts are the same for any number."""
    processes: int = 0
    """Processes that decode on one machine, one per GPU. 0: as many as there are GPUs, or one on a CPU. The
    transcripts are the same for any number."""
    shuffled_control: bool = False
    """Also score every utterance with the hypothesis for another utterance's audio. A model that listens does
    far worse on this control; one that only guesses does not."""
    seed: int = 0
    """Seed of that shuffle."""
    report_audio: float = 0.0
    """Megabytes of audio of the worst utterances that the report embeds, to be played on the page; 0: none.
    """


@dataclass
class Recipe:
    """A model, how it is trained, and how it is measured."""

    name: str = "custom"
    """Name of the recipe, shown in the report and in the dashboard."""
    description: str = ""
    """What the recipe is for, in a sentence or two."""
    published_wer: dict[str, float] = field(default_factory=dict)
    """Published word error rate in percent per test subset, shown next to the measured one."""
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    features: Features = field(default_factory=Features)
    projector: Projector = field(default_factory=Projector)
    llm: Llm = field(default_factory=Llm)
    training: Training = field(default_factory=Training)
    decoding: Decoding = field(default_factory=Decoding)

    @property
    def caches_features(self) -> bool:
        """Whether encoder outputs are computed once and cached, rather than on the fly."""
        return self.encoder.tuning == "frozen" and self.features.cache == "store"

    def __post_init__(self) -> None:
        for key, low in _LOWER_BOUNDS.items():
            value = value_of(self, key)
            # `not >=` rather than `<`, because NaN must be refused too.
            if not value >= low:
                raise ConfigurationError(f"Recipe {self.name}: {key} is {value} but must be at least {low}.")
        for key, high in _UPPER_BOUNDS.items():
            value = value_of(self, key)
            if not value <= high:
                raise ConfigurationError(f"Recipe {self.name}: {key} is {value} but must be at most {high}.")
        for key in ("training.learning_rate", "llm.learning_rate", "encoder.learning_rate"):
            rate = value_of(self, key)
            if rate is not None and not 0 < rate < math.inf:
                raise ConfigurationError(f"Recipe {self.name}: {key} is {rate} but must be above 0.")
        for key in ("llm", "encoder"):
            if getattr(self, key).tuning == "frozen" and getattr(self, key).learning_rate is not None:
                raise ConfigurationError(
                    f"Recipe {self.name}: {key}.learning_rate is set but {key}.tuning is frozen: "
                    f"set {key}.tuning to what should be trained, or remove the learning rate."
                )
        window = 2 * self.features.window_shards * self.features.shard_megabytes / 1000
        if self.features.cache == "store" and self.features.cache_gigabytes < window:
            raise ConfigurationError(
                f"Recipe {self.name}: features.cache_gigabytes ({self.features.cache_gigabytes}) is too "
                f"small for two windows of features.window_shards ({self.features.window_shards}) × "
                f"features.shard_megabytes ({self.features.shard_megabytes}): raise it to {window:g}, or "
                "lower one of the other two."
            )
        if self.llm.tuning == "lora" and not self.llm.lora.targets:
            raise ConfigurationError(
                f"Recipe {self.name}: llm.lora.targets names no layer; "
                "give at least one, such as [q_proj, v_proj]."
            )
        if self.llm.template != "chat" and (
            self.llm.template.count("{}") != 1 or self.llm.template.count("{audio}") > 1
        ):
            raise ConfigurationError(
                f"Recipe {self.name}: llm.template is {self.llm.template!r} but must contain {{}} once, "
                "for the prompt, and {audio} at most once; or be `chat`."
            )
        if self.training.deepspeed:
            # For files and overrides, load_recipe() has already moved the JSON's values to other keys. An
            # option on the command line arrives here directly, when the other keys already have their values.
            remaining: dict[str, Any] = {"deepspeed": self.training.deepspeed}
            adopt({"training": remaining}, f"Recipe {self.name}")
            if remaining != {"deepspeed": self.training.deepspeed}:
                raise ConfigurationError(
                    f"Recipe {self.name}: training.deepspeed also sets other keys of the recipe, which it "
                    "cannot do on the command line: write it into the recipe's file."
                )
        unknown = [t for t in self.training.trackers if t not in ("mlflow", "wandb")]
        if unknown:
            raise ConfigurationError(
                f"Recipe {self.name}: training.trackers knows mlflow and wandb, "
                f"not {unknown[0]}{nearest(unknown[0], ['mlflow', 'wandb']) or '.'}"
            )
        deepspeed_only = [
            key for key in ("zero_stage", "offload_optimizer", "deepspeed") if getattr(self.training, key)
        ]
        if self.training.engine != "deepspeed" and deepspeed_only:
            raise ConfigurationError(
                f"Recipe {self.name}: training.{deepspeed_only[0]} is DeepSpeed's, but training.engine is "
                f"{self.training.engine}: leave it out, or choose the engine deepspeed."
            )
        if self.training.offload_optimizer and self.training.zero_stage == 0:
            raise ConfigurationError(
                f"Recipe {self.name}: training.offload_optimizer needs training.zero_stage 1, 2 or 3; it is "
                "0."
            )
        if self.training.compile and self.training.zero_stage == 3:
            raise ConfigurationError(
                f"Recipe {self.name}: training.compile does not work with training.zero_stage 3, which "
                "gathers a layer's weights while it runs: leave one of them out, or choose the engine fsdp."
            )
        if self.training.compile and self.training.liger:
            raise ConfigurationError(
                f"Recipe {self.name}: training.compile and training.liger both replace the kernels of the "
                "LLM's layers: choose one."
            )
        if self.data.max_duration <= self.data.min_duration:
            raise ConfigurationError(
                f"Recipe {self.name}: data.max_duration ({self.data.max_duration}) must be above "
                f"data.min_duration ({self.data.min_duration})."
            )
        shortest = math.ceil(self.data.min_duration * 50)  # Encoders give 50 frames per second.
        if self.encoder.frames == "speech" and shortest < self.projector.downsampling:
            raise ConfigurationError(
                f"Recipe {self.name}: data.min_duration ({self.data.min_duration} s, {shortest} frames) "
                "leaves the shortest utterances without an audio position at projector.downsampling "
                f"{self.projector.downsampling}: raise it to {self.projector.downsampling / 50} or more."
            )
        if self.training.accumulation > 1 and not self.training.utterances_per_batch:
            raise ConfigurationError(
                f"Recipe {self.name}: training.accumulation is {self.training.accumulation} without "
                "training.utterances_per_batch, but batches by positions accumulate up to "
                "training.positions_per_step: set that, or training.utterances_per_batch."
            )
        if self.training.positions_per_batch > self.training.positions_per_step:
            raise ConfigurationError(
                f"Recipe {self.name}: training.positions_per_batch ({self.training.positions_per_batch}) "
                f"must not exceed training.positions_per_step ({self.training.positions_per_step}): a batch "
                "is a part of a step."
            )
        if self.decoding.nbest > self.decoding.beams:
            raise ConfigurationError(
                f"Recipe {self.name}: decoding.nbest is {self.decoding.nbest} but decoding.beams is "
                f"{self.decoding.beams}: a search finds as many answers as it has beams; lower nbest or "
                "raise beams."
            )
        if not self.data.test:
            raise ConfigurationError(
                f"Recipe {self.name}: data.test names no subset; give at least one, such as [test-*]."
            )


# A value may be equal to its bound.
_LOWER_BOUNDS = {
    "data.dev_fraction": 0.0,
    "data.min_duration": 0.0,
    "data.max_rejected": 0.0,
    "encoder.batch_seconds": 1,
    "features.shard_megabytes": 1,
    "features.window_shards": 1,
    "features.cache_gigabytes": 0.0,
    "features.parts": 1,
    "features.processes": 0,
    "features.workers": 0,
    "projector.downsampling": 1,
    "projector.hidden": 1,
    "projector.queries": 1,
    "projector.layers": 1,
    "llm.lora.rank": 1,
    "llm.lora.alpha": 0.0,
    "llm.lora.dropout": 0.0,
    "training.nodes": 1,
    "training.processes": 0,
    "training.epochs": 1,
    "training.max_steps": 1,
    "training.positions_per_step": 1,
    "training.positions_per_batch": 1,
    "training.weight_decay": 0.0,
    "training.warmup_steps": 0,
    "training.gradient_clipping": 0.0,
    "training.validate_every": 1,
    "training.log_every": 1,
    "training.patience": 0,
    "training.samples": 0,
    "training.utterances_per_batch": 0,
    "training.accumulation": 1,
    "training.nonfinite_steps": 1,
    "training.checkpoint_every": 0,
    "training.checkpoint_minutes": 0.0,
    "training.checkpoints": 1,
    "decoding.parts": 1,
    "decoding.processes": 0,
    "decoding.beams": 1,
    "decoding.nbest": 1,
    "decoding.report_audio": 0.0,
    "decoding.max_new_tokens": 1,
    "decoding.repetition_penalty": 1e-6,
    "decoding.positions_per_batch": 1,
}
_UPPER_BOUNDS = {"data.dev_fraction": 0.5, "data.max_rejected": 1.0, "llm.lora.dropout": 0.9}


def as_int(value: Any) -> Any:
    """`2.0` → `2`, also within lists; anything else is returned unchanged.

    Kubeflow passes a pipeline's parameter that is a mapping as JSON, in which all numbers are floats.
    """
    if isinstance(value, list):
        return [as_int(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a key by its full name, such as `training.max_steps`."""
    return operator.attrgetter(key)(recipe)


def shipped_recipes() -> dict[str, Path]:
    """Files of the recipes that come with the package, by name."""
    folder = resources.files("slam_asr") / "recipes"
    return {
        Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if f.name.endswith(".yaml")
    }


def load_recipe(source: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe by shipped name, file, or YAML text, with overrides applied.

    Args:
        source: `demo`, `path/to/recipe.yaml`, `s3://bucket/recipe.yaml`, or the YAML itself (any text with a
            line break or that begins with a brace).
        overrides: values by full key, such as `{"training.max_steps": 200}`.

    Raises:
        UserError: no such recipe, an unknown key, a wrong type, or values that contradict each other.
    """
    values, where = _read(source)
    for key, value in (overrides or {}).items():
        *sections, name = key.split(".")
        target = values
        for depth, section in enumerate(sections, start=1):
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigurationError(
                    f"{where}: {'.'.join(sections[:depth])} must contain keys of its own."
                )
        target[name] = as_int(value)
    adopt(values, where)
    return typed(values, Recipe, where)


def recipe_values(source: str) -> dict[str, Any]:
    """A recipe's values as nested dictionaries, after all checks; a command line has them as its defaults."""
    return asdict(load_recipe(source))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, in the order of the dataclasses."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True, width=100)


def recipe_keys() -> list[str]:
    """Full names of all sections and keys: `name`, `training`, `training.max_steps`, …"""
    return keys_of(Recipe)


def _read(source: str) -> tuple[dict[str, Any], str]:
    shipped = shipped_recipes()
    text: str | bytes
    if "\n" in source or source.startswith("{"):
        text, where = source, "The recipe given as text"
    elif source in shipped:
        text, where = shipped[source].read_bytes(), f"Recipe {source}"
    elif is_s3(source):
        text, where = read_bytes(source), f"Recipe {source}"
    elif os.path.isfile(source):
        text, where = Path(source).read_bytes(), f"Recipe {source}"
    else:
        hint = nearest(source, list(shipped)) or "."
        raise ConfigurationError(
            f"No recipe named {source}, and no such file{hint} Shipped recipes: {', '.join(shipped)}."
        )
    values = parse_yaml(text, where, "encoder:")
    # `...` is for a recipe without the key, because `features:` without a value is None.
    if values.get("features", ...) in (None, "none"):
        values["features"] = {"cache": "none"}
    return values, where
