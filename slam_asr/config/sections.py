"""The sections of a recipe, except `training`: the data, the models, and decoding.

Each dataclass is a section, and the docstring below each field is its help text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from slam_asr.config.schema import bounded


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
    dev_fraction: float = bounded(0.05, at_least=0.0, at_most=0.5)
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
    min_duration: float = bounded(0.1, at_least=0.0)
    """Seconds; shorter utterances are rejected."""
    max_duration: float = 30.0
    """Seconds; longer utterances are rejected. Whisper's window is 30 s."""
    max_rejected: float = bounded(0.05, at_least=0.0, at_most=1.0)
    """Share of rejected utterances (unreadable, too short, without text …) above which the stage fails,
    because the corpus or the recipe is then probably wrong."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence for each pair of values that cannot go together."""
        if self.max_duration <= self.min_duration:
            yield (
                f"data.max_duration ({self.max_duration}) must be above "
                f"data.min_duration ({self.min_duration})."
            )
        if not self.test:
            yield "data.test names no subset; give at least one, such as [test-*]."


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
    batch_seconds: float = bounded(240.0, at_least=1)
    """Seconds of audio in one batch of the encoder, including padding: every utterance counts as if it were
    as long as the longest of its batch, and with Whisper as complete windows of 30 s. More uses a GPU better
    but takes more memory."""
    tuning: Literal["frozen", "full"] = "frozen"
    """`full` trains the encoder too. Its outputs then change at every step, so they cannot be cached and each
    step encodes its audio."""
    learning_rate: float | None = bounded(None, above=0)
    """Peak of the encoder's own learning rate if it is trained. Default: training.learning_rate."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence if a learning rate is set that nothing uses."""
        yield from _unused_rate("encoder", self)


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
    shard_megabytes: int = bounded(512, at_least=1)
    """Maximum size of a shard. Smaller shards lose less work when extraction is interrupted; larger ones mean
    fewer objects in the store."""
    window_shards: int = bounded(8, at_least=1)
    """Shards whose utterances are shuffled together in training: a window. More shards mix the utterances
    better but take more local disk, which must hold two windows at once."""
    cache_gigabytes: float = bounded(50.0, at_least=0.0)
    """Local disk on each machine for shards fetched from object storage; the least recently used are deleted
    first."""
    parts: int = bounded(1, at_least=1)
    """Work shards that the pipeline divides extraction into. Each is a step that can run on any node. More
    work shards than feature shards have no use."""
    processes: int = bounded(0, at_least=0)
    """Processes that extract on one machine, one per GPU. 0: as many as there are GPUs, or one on a CPU."""
    workers: int = bounded(0, at_least=0)
    """Processes per extracting process that read and prepare audio. 0: the free cores, 16 at most."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence if the local disk cannot hold two windows."""
        windows = 2 * self.window_shards * self.shard_megabytes / 1000
        if self.cache == "store" and self.cache_gigabytes < windows:
            yield (
                f"features.cache_gigabytes ({self.cache_gigabytes}) is too small for two windows of "
                f"features.window_shards ({self.window_shards}) × features.shard_megabytes "
                f"({self.shard_megabytes}): raise it to {windows:g}, or lower one of the other two."
            )


@dataclass
class Projector:
    """The trained part between the encoder and the LLM."""

    kind: Literal["linear", "cov1d-linear", "q-former"] = "linear"
    """`linear` is the published architecture: k neighbouring frames are concatenated, then Linear, ReLU,
    Linear. `cov1d-linear` applies a convolution over k frames first. `q-former` turns audio of any length
    into a fixed number of positions."""
    downsampling: int = bounded(5, at_least=1)
    """k: encoder frames joined into one LLM position. 5 gives 10 positions per second; more is faster but
    blurs short words."""
    hidden: int = bounded(2048, at_least=1)
    """Width between the two linear layers. A q-former ignores it."""
    queries: int = bounded(64, at_least=1)
    """LLM positions that a q-former outputs, whatever the length of the audio. The other kinds ignore it."""
    layers: int = bounded(8, at_least=1)
    """Layers of a q-former. The other kinds ignore it."""
    init_from: str = ""
    """A model folder, local or s3://, or the name of a shipped model: training starts from its projector,
    which must have the same kind and sizes. Empty: random weights, drawn with the seed."""


@dataclass
class Lora:
    """Low-rank adapters on the LLM, used if `llm.tuning` is `lora`."""

    rank: int = bounded(8, at_least=1)
    """r: width of the bottleneck. More can learn more but takes more memory."""
    alpha: float = bounded(32, at_least=0.0)
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: float = bounded(0.05, at_least=0.0, at_most=0.9)
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
    learning_rate: float | None = bounded(None, above=0)
    """Peak of the LLM's own learning rate if it is trained. Default: training.learning_rate."""
    lora: Lora = field(default_factory=Lora)

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work, or that nothing uses."""
        yield from _unused_rate("llm", self)
        if self.tuning == "lora" and not self.lora.targets:
            yield "llm.lora.targets names no layer; give at least one, such as [q_proj, v_proj]."
        if self.template != "chat" and (self.template.count("{}") != 1 or self.template.count("{audio}") > 1):
            yield (
                f"llm.template is {self.template!r} but must contain {{}} once, "
                "for the prompt, and {audio} at most once; or be `chat`."
            )


@dataclass
class Decoding:
    """How test utterances are transcribed and scored."""

    checkpoint: Literal["latest", "best", "average"] = "latest"
    """Which of a training's checkpoints the pipeline turns into a model: the one of the last step, the one
    with the lowest dev loss, or the mean of all retained ones (training.checkpoints)."""
    beams: int = bounded(4, at_least=1)
    """Hypotheses that beam search retains at each token; 1 is greedy search, the fastest. More beams can find
    better answers but take more memory and time."""
    nbest: int = bounded(1, at_least=1)
    """Answers per utterance that are written to nbest.jsonl with their scores, best first. Must not exceed
    beams."""
    max_new_tokens: int = bounded(200, at_least=1)
    """Maximum number of tokens in an answer; longer answers are cut."""
    repetition_penalty: float = bounded(1.0, at_least=1e-06)
    """Above 1, tokens that the answer already contains become less likely, which prevents loops."""
    length_penalty: float = 1.0
    """Exponent of the length in a beam's score; above 1 favours longer answers."""
    positions_per_batch: int = bounded(20_000, at_least=1)
    """LLM positions (audio, prompt and max_new_tokens, times beams) decoded at once. More uses a GPU better
    but takes more memory."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of decoding."""
    parts: int = bounded(1, at_least=1)
    """Work shards that the pipeline divides decoding into. Each is a step that can run on any node. The
    transcripts are the same for any number."""
    processes: int = bounded(0, at_least=0)
    """Processes that decode on one machine, one per GPU. 0: as many as there are GPUs, or one on a CPU. The
    transcripts are the same for any number."""
    shuffled_control: bool = False
    """Also score every utterance with the hypothesis for another utterance's audio. A model that listens does
    far worse on this control; one that only guesses does not."""
    seed: int = 0
    """Seed of that shuffle."""
    report_audio: float = bounded(0.0, at_least=0.0)
    """Megabytes of audio of the worst utterances that the report embeds, to be played on the page; 0: none.
    """

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence if more answers are requested than the search finds."""
        if self.nbest > self.beams:
            yield (
                f"decoding.nbest is {self.nbest} but decoding.beams is {self.beams}: a search finds as many "
                "answers as it has beams; lower nbest or raise beams."
            )


def _unused_rate(name: str, section: Encoder | Llm) -> Iterator[str]:
    if section.tuning == "frozen" and section.learning_rate is not None:
        yield (
            f"{name}.learning_rate is set but {name}.tuning is frozen: "
            f"set {name}.tuning to what should be trained, or remove the learning rate."
        )
