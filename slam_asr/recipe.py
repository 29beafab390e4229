"""Recipes: everything that decides what is trained and measured, typed and documented.

A recipe is a YAML file. Those that ship lie in `slam_asr/recipes/` and go by their name; any other
goes by its path. Keys are checked against the dataclasses below: a key that is unknown, a value of
the wrong type and a combination that cannot work are refused by the key's full name, before
anything is loaded. The command line can override every field: `--training.max_steps 200`.
"""

import math
import operator
import os
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from slam_asr.configuration import keys_of, nearest, parse_yaml, typed
from slam_asr.deepspeed_json import adopt
from slam_asr.errors import UserError
from slam_asr.storage import is_s3, read_bytes


@dataclass
class Columns:
    """Names of a table's columns. One left empty is found by its usual names."""

    audio: str = ""
    """The audio file, or the audio itself. Usual names: audio, path, file, wav, file_name and the like."""
    text: str = ""
    """The transcript. Usual names: text, sentence, transcript, transcription, target."""
    key: str = ""
    """What tells utterances apart. Usual names: id, key, utt_id; without one, the audio file's path."""
    split: str = ""
    """The subset, which the patterns of train, dev and test are matched against. Usual names: split, subset; without one, the table's file name."""
    speaker: str = ""
    """Who speaks. Usual names: speaker, speaker_id, client_id."""
    start: str = ""
    """Seconds into the file where an utterance begins, where rows are segments of longer files. Taken only if it is named here."""
    duration: str = ""
    """Seconds that a segment lasts; to the file's end if not named."""


@dataclass
class Data:
    """Which utterances, and how their transcripts are written."""

    kind: Literal["auto", "librispeech", "table", "folder", "jsonlines", "kaldi", "lhotse", "huggingface"] = (
        "auto"
    )
    """How the corpus is laid out; `auto` finds it out from what lies there."""
    train: list[str] = field(default_factory=lambda: ["train-*"])
    """Subsets of the corpus to train on; shell patterns are allowed. `[]`: none, where a trained model is only measured."""
    dev: list[str] = field(default_factory=lambda: ["dev-other"])
    """Subsets to validate on while training. Where the corpus has none of them, `dev_fraction` is held out of train."""
    test: list[str] = field(default_factory=lambda: ["test-*"])
    """Subsets to decode and score, each reported by itself."""
    dev_fraction: float = 0.05
    """Share of the train utterances held out for validation where the corpus has no dev subset; chosen by a hash of the key, so it never changes."""
    columns: Columns = field(default_factory=Columns)
    audio_root: str = ""
    """Folder or s3:// prefix that the relative audio paths of a table, a list or cuts count from; the folder of that file if not given."""
    text: Literal["lower", "upper", "as-is", "whisper"] = "lower"
    """How transcripts are written: in one case, as they are, or through Whisper's normaliser for English, which spells out contractions and leaves punctuation out. LLMs spell lower case with fewer tokens; a model and its test set must agree."""
    min_duration: float = 0.1
    """Seconds; anything shorter is set aside."""
    max_duration: float = 30.0
    """Seconds; anything longer is set aside. Whisper hears 30 s at most."""
    max_rejected: float = 0.05
    """Share of bad utterances (unreadable, too short, without text …) above which the stage fails instead of setting them aside."""


@dataclass
class Encoder:
    """The speech encoder."""

    name: str = "openai/whisper-tiny.en"
    """A Whisper, WavLM, HuBERT or wav2vec 2.0: a name on the model hub, a folder or s3:// prefix with transformers' files, or an original checkpoint file (OpenAI's Whisper, Microsoft's WavLM, fairseq's HuBERT and wav2vec 2.0)."""
    frames: Literal["all", "speech"] = "all"
    """How much of Whisper's output is used: its whole 30-s window (300 audio positions, as the published models were trained), or the first ceil(samples / 320) frames (10 positions a second: several times faster to train). The other encoders have no window and give what the audio is long."""
    long_audio: Literal["cut", "split", "set-aside"] = "cut"
    """What becomes of audio longer than Whisper's window, where `data.max_duration` lets it through: cut there (as the reference does; its transcript is not), split into windows whose frames are joined, or left out of training and decoding and counted."""
    batch_seconds: float = 240.0
    """Seconds of audio encoded at once, each utterance counted as long as the batch's longest and Whisper's as its whole windows of 30 s. More fills a GPU better and takes more memory."""
    tuning: Literal["frozen", "full"] = "frozen"
    """Whether the encoder is trained too. Then nothing can be cached, and every step encodes its audio."""
    learning_rate: float | None = None
    """Peak of the encoder's own learning rate where it is trained; training.learning_rate if not given."""


@dataclass
class Features:
    """The cache of encoder outputs."""

    cache: Literal["store", "none"] = "store"
    """Whether the frozen encoder's outputs are computed once and kept. `none` (or `features: none` for the whole section) encodes on the way in training and decoding: the same numbers, no storage, and the encoder's time in every epoch."""
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] = "bf16"
    """How values are stored. bf16 halves fp32's size, and training computes in bf16 anyway; fp8, with a scale for each frame, halves it again."""
    shard_megabytes: int = 512
    """Largest size of a shard. Smaller shards lose less work when extraction is interrupted; larger ones are fewer objects."""
    window_shards: int = 8
    """Shards whose utterances are shuffled together in training. More mixes better and takes more local disk: two windows are there at once."""
    cache_gigabytes: float = 50.0
    """Local disk that shards fetched from object storage may take on each machine; the least recently used go first."""
    parts: int = 1
    """Parts that the pipeline divides extraction into, each a step that any node may take. No more than there are shards."""
    processes: int = 0
    """Processes that extract on one machine, one a GPU. 0: as many as there are GPUs, or one on a CPU."""
    workers: int = 0
    """Processes beside each of those that read and prepare audio. 0: the cores that are free, 16 at most."""


@dataclass
class Projector:
    """The trained part between encoder and LLM."""

    kind: Literal["linear", "cov1d-linear", "q-former"] = "linear"
    """`linear` is the published architecture: k neighbouring frames are joined, then Linear, ReLU, Linear. `cov1d-linear` puts a convolution over k frames first. `q-former` turns any audio into a fixed number of positions."""
    downsampling: int = 5
    """k: encoder frames joined into one LLM position. 5 gives 10 positions a second; more is faster and blurs short words."""
    hidden: int = 2048
    """Width between the two linear layers; of no meaning to a q-former."""
    queries: int = 64
    """LLM positions that a q-former gives, whatever the audio is long; of no meaning to the others."""
    layers: int = 8
    """Layers of a q-former; of no meaning to the others."""
    init_from: str = ""
    """A model folder, local or s3://, or the name of a shipped model, whose projector training begins with; of the same kind and sizes. Empty: random weights by the seed."""


@dataclass
class Lora:
    """Low-rank adapters on the LLM, where `llm.tuning` is `lora`."""

    rank: int = 8
    """r: width of the bottleneck."""
    alpha: float = 32
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Share of the adapter's inputs that is dropped in training."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get one."""


@dataclass
class Llm:
    """The language model."""

    name: str = "lmsys/vicuna-7b-v1.5"
    """Any causal LM of transformers: a name on the model hub, or a folder or s3:// prefix with its files."""
    prompt: str = "Transcribe speech to text. "
    """What the LLM is asked; a space at its end belongs to it."""
    training_prompts: list[str] = field(default_factory=list)
    """Prompts drawn at random in training, one for each utterance in each epoch; validation and decoding use `prompt`. Empty: always `prompt`."""
    template: str = "USER: {}\n ASSISTANT:"
    """What stands around the prompt, at `{}`. The audio stands in front of it all, or where the template says `{audio}`. `chat`: the model's own chat template, with the audio at the start of the user's turn."""
    tuning: Literal["frozen", "lora", "full"] = "frozen"
    """What of the LLM is trained: nothing, low-rank adapters, or all of it."""
    learning_rate: float | None = None
    """Peak of the LLM's own learning rate where it is trained; training.learning_rate if not given."""
    lora: Lora = field(default_factory=Lora)


@dataclass
class Training:
    """How the projector is trained."""

    engine: Literal["deepspeed", "ddp", "fsdp"] = "deepspeed"
    """What spreads the training over processes: DeepSpeed; PyTorch's DDP, where each process holds the whole model; or its FSDP2, where each holds a part. All take the same steps."""
    nodes: int = 1
    """Machines to train on. With more than one, the pipeline's step `train` starts them as a TrainJob of Kubeflow Trainer."""
    processes: int = 0
    """Processes on each machine, one a GPU. 0: as many as there are GPUs, or one on a CPU."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of the frozen weights and the projector's passes; the projector's master weights are always fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage. 0 is fastest wherever the LLM fits on one GPU; 3 spreads the frozen LLM too. Of no meaning to the other engines."""
    deepspeed: dict[str, Any] | str = field(default_factory=dict)
    """DeepSpeed's own JSON, or the path of one: what a recipe has keys for goes into them, the rest to DeepSpeed; contradictions are refused."""
    offload_optimizer: bool = False
    """Keep the optimiser's state (12 bytes a trained weight) in the host's memory and step there; from ZeRO stage 1 on."""
    gradient_checkpointing: bool = False
    """Keep only each LLM layer's input and compute the layer again on the way back: a fraction of the memory, a third more time."""
    compile: bool = False
    """Have torch.compile fuse the operations of each LLM layer; needs a C++ compiler where it trains, and the first steps wait for it. Not with ZeRO stage 3."""
    liger: bool = False
    """Use Liger's kernels for the LLM's norms, rotary embeddings and feed-forward layers; for GPUs, from the package liger-kernel."""
    epochs: int = 3
    """Passes over the train utterances; `max_steps` may end training earlier."""
    max_steps: int = 100_000
    """Optimiser steps at most."""
    positions_per_step: int = 6000
    """LLM positions (audio, prompt and answer) in one optimiser step, over all processes. Fixes the steps whatever the number of processes."""
    positions_per_batch: int = 6000
    """LLM positions that one process puts through the LLM at once. Less takes less memory; the rest of a step is accumulated."""
    packing: bool = True
    """Put the utterances of a batch in one row, one behind the other, where the LLM can keep them apart: nothing is padded. Else, and where it cannot, side by side, padded to the longest."""
    utterances_per_batch: int = 0
    """Utterances that one process puts through the LLM at once, as the reference has it, instead of batches by positions. A step then has this many × `accumulation` × processes, and depends on their number. 0: batches by positions."""
    accumulation: int = 1
    """Batches of `utterances_per_batch` that each process adds up in a step."""
    learning_rate: float = 1e-4
    """Peak of AdamW's learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after warm-up: constant as published, or down to zero at the last step."""
    gradient_clipping: float = 0.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    validate_every: int = 1000
    """Steps between validations on dev; there is one at the end in any case."""
    samples: int = 8
    """Dev utterances that are transcribed (greedily) at each validation, always the same: a first word error rate, and texts to look at; 0: none."""
    trackers: list[str] = field(default_factory=list)
    """Where else the numbers go, beside the log, curve.jsonl and TensorBoard's files: mlflow, wandb. Their packages and accounts are yours to provide."""
    patience: int = 0
    """Validations without a lower dev loss after which training ends early; 0: never."""
    nonfinite_steps: int = 3
    """Steps in a row whose loss or gradient is not a number before training stops; each is left out, and its utterances are written to nonfinite.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0: by time alone. There is one at the end, and at each validation with the lowest dev loss so far."""
    checkpoint_minutes: float = 15.0
    """Minutes after which there is a checkpoint in any case; 0: by steps alone."""
    checkpoints: int = 2
    """Checkpoints that are kept: the last ones, and the one with the lowest dev loss besides."""
    log_every: int = 10
    """Steps between two lines of the log."""
    seed: int = 0
    """Of the projector's initial weights and the order of the utterances."""


@dataclass
class Decoding:
    """How transcripts are found and scored."""

    checkpoint: Literal["latest", "best", "average"] = "latest"
    """Which of a training's checkpoints the pipeline makes a model of: that of the last step, the one with the lowest dev loss, or the mean of all that were kept (training.checkpoints)."""
    beams: int = 4
    """Hypotheses kept at each token; 1 is greedy and fastest."""
    nbest: int = 1
    """Answers to each utterance that are written down with their scores, best first, in nbest.jsonl; no more than beams."""
    max_new_tokens: int = 200
    """Tokens at which an answer is cut."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already said become less likely: against loops."""
    length_penalty: float = 1.0
    """Exponent of the length in a beam's score; above 1 favours longer answers."""
    positions_per_batch: int = 20_000
    """LLM positions (audio, prompt and room for the answer, times beams) decoded at once."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of decoding."""
    parts: int = 1
    """Parts that the pipeline divides decoding into, each a step that any node may take. Their number changes no text."""
    processes: int = 0
    """Processes that decode on one machine, one a GPU. 0: as many as there are GPUs, or one on a CPU. Their number changes no text."""
    shuffled_control: bool = False
    """Also score every utterance with what the model writes for the audio of another one. A model that listens does far worse there; one that only guesses does not."""
    seed: int = 0
    """Of the shuffle."""
    report_audio: float = 0.0
    """Megabytes of audio of the worst utterances that the report holds, to be played on the page; 0: none."""


@dataclass
class Recipe:
    """A model, how it is trained, and how it is measured."""

    name: str = "custom"
    """Shown in the report and in the dashboard."""
    description: str = ""
    """What the recipe is for, in a sentence or two."""
    published_wer: dict[str, float] = field(default_factory=dict)
    """Published word error rate in percent by test subset, shown beside ours."""
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    features: Features = field(default_factory=Features)
    projector: Projector = field(default_factory=Projector)
    llm: Llm = field(default_factory=Llm)
    training: Training = field(default_factory=Training)
    decoding: Decoding = field(default_factory=Decoding)

    @property
    def caches_features(self) -> bool:
        """Whether encoder outputs are computed once and kept, rather than on the way."""
        return self.encoder.tuning == "frozen" and self.features.cache == "store"

    def __post_init__(self) -> None:
        for key, low in _LOWER_BOUNDS.items():
            value = value_of(self, key)
            if not value >= low:
                raise UserError(f"Recipe {self.name}: {key} is {value} but must be at least {low}.")
        for key, high in _UPPER_BOUNDS.items():
            value = value_of(self, key)
            if not value <= high:
                raise UserError(f"Recipe {self.name}: {key} is {value} but must be at most {high}.")
        for key in ("training.learning_rate", "llm.learning_rate", "encoder.learning_rate"):
            rate = value_of(self, key)
            if rate is not None and not 0 < rate < math.inf:
                raise UserError(f"Recipe {self.name}: {key} is {rate} but must be above 0.")
        for key in ("llm", "encoder"):
            if getattr(self, key).tuning == "frozen" and getattr(self, key).learning_rate is not None:
                raise UserError(
                    f"Recipe {self.name}: {key}.learning_rate is given but {key}.tuning is frozen: choose what is to be trained, or leave it out."
                )
        window = 2 * self.features.window_shards * self.features.shard_megabytes / 1000
        if self.features.cache == "store" and self.features.cache_gigabytes < window:
            raise UserError(
                f"Recipe {self.name}: features.cache_gigabytes ({self.features.cache_gigabytes}) is too small for two windows of "
                f"features.window_shards ({self.features.window_shards}) × features.shard_megabytes ({self.features.shard_megabytes}): "
                f"raise it to {window:g} or lower those."
            )
        if self.llm.tuning == "lora" and not self.llm.lora.targets:
            raise UserError(
                f"Recipe {self.name}: llm.lora.targets names no layer; give at least one, such as [q_proj, v_proj]."
            )
        if self.llm.template != "chat" and (
            self.llm.template.count("{}") != 1 or self.llm.template.count("{audio}") > 1
        ):
            raise UserError(
                f"Recipe {self.name}: llm.template is {self.llm.template!r} but must hold {{}} once, for the prompt, and {{audio}} "
                "at most once; or be `chat`."
            )
        if self.training.deepspeed:
            # Files and overrides have been through this; a command's own option has not, and comes too late to fill other keys.
            left: dict[str, Any] = {"deepspeed": self.training.deepspeed}
            adopt({"training": left}, f"Recipe {self.name}")
            if left != {"deepspeed": self.training.deepspeed}:
                raise UserError(
                    f"Recipe {self.name}: training.deepspeed decides other keys too, so it belongs into the recipe's file, not on the command line: write it there."
                )
        unknown = [t for t in self.training.trackers if t not in ("mlflow", "wandb")]
        if unknown:
            raise UserError(
                f"Recipe {self.name}: training.trackers knows mlflow and wandb, not {unknown[0]}{nearest(unknown[0], ['mlflow', 'wandb']) or '.'}"
            )
        theirs = [
            key for key in ("zero_stage", "offload_optimizer", "deepspeed") if getattr(self.training, key)
        ]
        if self.training.engine != "deepspeed" and theirs:
            key = theirs[0]
            raise UserError(
                f"Recipe {self.name}: training.{key} is DeepSpeed's, but training.engine is {self.training.engine}: leave it out, or choose "
                "the engine deepspeed."
            )
        if self.training.offload_optimizer and self.training.zero_stage == 0:
            raise UserError(
                f"Recipe {self.name}: training.offload_optimizer needs training.zero_stage 1, 2 or 3; it is 0."
            )
        if self.training.compile and self.training.zero_stage == 3:
            raise UserError(
                f"Recipe {self.name}: training.compile does not work with training.zero_stage 3, under which a layer's weights are put together while it "
                "runs: leave one of them out, or choose the engine fsdp."
            )
        if self.training.compile and self.training.liger:
            raise UserError(
                f"Recipe {self.name}: training.compile and training.liger both replace what the LLM's layers compute with: choose one."
            )
        if self.data.max_duration <= self.data.min_duration:
            raise UserError(
                f"Recipe {self.name}: data.max_duration ({self.data.max_duration}) must be above "
                f"data.min_duration ({self.data.min_duration})."
            )
        shortest = math.ceil(self.data.min_duration * 50)
        if self.encoder.frames == "speech" and shortest < self.projector.downsampling:
            raise UserError(
                f"Recipe {self.name}: data.min_duration ({self.data.min_duration} s, {shortest} frames) leaves the shortest "
                f"utterances without an audio position at projector.downsampling {self.projector.downsampling}: raise it to "
                f"{self.projector.downsampling / 50} or more."
            )
        if self.training.accumulation > 1 and not self.training.utterances_per_batch:
            raise UserError(
                f"Recipe {self.name}: training.accumulation is {self.training.accumulation} without training.utterances_per_batch: batches by "
                "positions are added up as training.positions_per_step says; set that, or utterances_per_batch."
            )
        if self.training.positions_per_batch > self.training.positions_per_step:
            raise UserError(
                f"Recipe {self.name}: training.positions_per_batch ({self.training.positions_per_batch}) must not "
                f"exceed training.positions_per_step ({self.training.positions_per_step}): a batch is a part of a step."
            )
        if self.decoding.nbest > self.decoding.beams:
            raise UserError(
                f"Recipe {self.name}: decoding.nbest is {self.decoding.nbest} but decoding.beams is {self.decoding.beams}: a search finds as many answers as it "
                "has beams; lower the one or raise the other."
            )
        if not self.data.test:
            raise UserError(
                f"Recipe {self.name}: data.test names no subset; give at least one, such as [test-*]."
            )


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


def whole(value: Any) -> Any:
    """`2.0` → `2`: a pipeline's parameter of several keys knows numbers of one kind only."""
    if isinstance(value, list):
        return [whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a field by its full name, such as `training.max_steps`."""
    return operator.attrgetter(key)(recipe)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = resources.files("slam_asr") / "recipes"
    return {
        Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if f.name.endswith(".yaml")
    }


def load_recipe(source: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A recipe by shipped name, file, or YAML text, with overrides applied.

    Args:
        source: `demo`, `path/to/recipe.yaml`, or the YAML itself (anything with a line break, or in braces).
        overrides: values by full key, such as `{"training.max_steps": 200}`.

    Raises:
        UserError: no such recipe, an unknown key, a wrong type, or values that contradict.
    """
    values, where = _read(source)
    for key, value in (overrides or {}).items():
        *sections, name = key.split(".")
        target = values
        for depth, section in enumerate(sections, start=1):
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"{where}: {'.'.join(sections[:depth])} must hold keys of its own.")
        target[name] = whole(value)
    adopt(values, where)
    return typed(values, Recipe, where)


def recipe_values(source: str) -> dict[str, Any]:
    """A recipe's own values as nested dictionaries, checked: defaults for a command line."""
    return asdict(load_recipe(source))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every field, in the order of the dataclasses."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True, width=100)


def recipe_keys() -> list[str]:
    """Full names of all sections and fields: `name`, `training`, `training.max_steps`, …"""
    return keys_of(Recipe)


def _read(source: str) -> tuple[dict[str, Any], str]:
    shipped = shipped_recipes()
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
        raise UserError(
            f"No recipe named {source}, and no such file{hint} Shipped recipes: {', '.join(shipped)}."
        )
    values = parse_yaml(text, where, "encoder:")
    if values.get("features", ...) in (None, "none"):
        values["features"] = {"cache": "none"}
    return values, where
