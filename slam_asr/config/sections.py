"""The sections of a recipe for the data, the features and the models.

Each dataclass is a section, and the docstring below each field is its help text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from slam_asr.config.schema import bounded


@dataclass
class Columns:
    """Names of a table's columns. If a field is empty, its column is found by the usual names."""

    audio: str = ""
    """The audio file, or the audio itself. Usual names: audio, path, file, wav, file_name and similar."""
    text: str = ""
    """The transcript. Usual names: text, sentence, transcript, transcription, target."""
    key: str = ""
    """A unique name for each utterance. Usual names: id, key, utt_id and similar; without such a column, the
    audio file's path."""
    split: str = ""
    """The subset's name. The patterns in `data.train`, `data.dev` and `data.test` are matched against it.
    Usual names: split, subset, partition; without such a column, the table's file name."""
    speaker: str = ""
    """The speaker. Usual names: speaker, speaker_id, client_id and similar."""
    start: str = ""
    """Start of an utterance within its file in seconds, for tables whose rows are segments of longer files.
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
    """Subsets of the corpus to train on; shell patterns are allowed. A subset called train, dev (or
    validation, valid or val) or test belongs to that split, whatever the patterns are. `[]` if you only
    measure a model that is already trained."""
    dev: list[str] = field(default_factory=lambda: ["dev-other"])
    """Subsets to validate on during training. If the corpus has none of them, `dev_fraction` of the train
    utterances is held out instead."""
    test: list[str] = field(default_factory=lambda: ["test-*"])
    """Subsets to decode and score, each reported separately."""
    dev_fraction: float = bounded(0.05, at_least=0.0, at_most=0.5)
    """Share of the train utterances held out for validation if the corpus has no dev subset; at least one is
    held out. A hash of the key decides, so the same utterances are held out every time."""
    columns: Columns = field(default_factory=Columns)
    audio_root: str = ""
    """Folder or s3:// prefix to which relative audio paths are resolved. Default: the folder of the file
    (table, list or cuts) that contains the paths."""
    text: Literal["lower", "upper", "as-is", "whisper"] = "lower"
    """How transcripts are written: in lower or upper case, unchanged, or normalised by Whisper's English
    normaliser, which expands contractions and removes punctuation. LLMs need fewer tokens for lower case.
    Train and test a model with the same setting."""
    tags: Literal["keep", "drop", "punctuation"] = "keep"
    """What happens to tags such as `<noise>` in transcripts. `keep`: they are text like any other. `drop`:
    they are removed, and a transcript of nothing else is rejected as blank. `punctuation`: GigaSpeech's
    `<comma>`, `<period>`, `<questionmark>` and `<exclamationpoint>` become punctuation, and other tags are
    removed."""
    min_duration: float = bounded(0.1, at_least=0.0)
    """Seconds; shorter utterances are rejected."""
    max_duration: float = 30.0
    """Seconds; longer utterances are rejected. Whisper's window is 30 s."""
    max_rejected: float = bounded(0.05, at_least=0.0, at_most=1.0)
    """Maximum share of rejected utterances (unreadable, too short, without text …). Above it the stage fails,
    because the corpus or the recipe is probably wrong."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence for each value, or pair of values, that cannot work."""
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
    """How much of Whisper's output the LLM receives. `all`: the complete 30 s window, as the published models
    were trained; with projector.downsampling 5, that is 300 LLM positions. `speech`: only the frames of
    the audio itself, ceil(samples / 320), which trains several times faster. The other encoders have no
    window; their output is as long as the audio."""
    long_audio: Literal["cut", "split", "set-aside"] = "cut"
    """What happens to audio longer than Whisper's 30 s window, if `data.max_duration` allows such audio.
    `cut`: only the first window is encoded, but the transcript is unchanged, as in
    SLAM-LLM. `split`: the audio is split into windows whose frames are concatenated. `set-aside`: the
    utterance is excluded from training and decoding, and counted."""
    batch_seconds: float = bounded(240.0, at_least=1)
    """Maximum seconds of audio in one encoder batch, including padding. Every utterance counts as long as the
    longest one in its batch; with Whisper, it counts as complete windows of 30 s. Larger batches use the GPU
    better but need more memory."""
    tuning: Literal["frozen", "full"] = "frozen"
    """`full` trains the encoder too. Its outputs then change at every step, so they cannot be cached and each
    step encodes its audio."""
    learning_rate: float | None = bounded(None, above=0)
    """Peak learning rate of the encoder, if it is trained. Default: training.learning_rate."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence if a learning rate is set that nothing uses."""
        yield from _unused_rate("encoder", self)


@dataclass
class Features:
    """The cache of encoder outputs."""

    cache: Literal["store", "none"] = "store"
    """`store` computes the frozen encoder's outputs once and caches them. `none` (or `features: none` for the
    complete section) encodes on the fly in training and decoding. This gives the same numbers and needs no
    storage, but the encoder runs again in every epoch."""
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] = "bf16"
    """Number format of cached features. bf16 needs half the space of fp32, and training computes in bf16
    anyway. fp8, with one scale per frame, needs about half the space of bf16."""
    shard_megabytes: int = bounded(512, at_least=1)
    """Maximum size of a shard. Smaller shards lose less work when extraction is interrupted; larger ones mean
    fewer objects in the store."""
    window_shards: int = bounded(8, at_least=1)
    """Number of shards whose utterances are shuffled together in training (a window of shards). More shards
    mix the utterances better but need more local disk, which must hold two such windows at once."""
    cache_gigabytes: float = bounded(50.0, at_least=0.0)
    """Gigabytes of local disk on each machine for shards fetched from object storage. The least recently used
    shards are deleted first."""
    parts: int = bounded(1, at_least=1)
    """Number of work shards into which the pipeline divides extraction. Each is a step that can run on any
    node. More work shards than feature shards bring no benefit."""
    processes: int = bounded(0, at_least=0)
    """Processes that extract on one machine, one per GPU. 0: as many as there are GPUs, or one on a CPU."""
    workers: int = bounded(0, at_least=0)
    """Worker processes that read and prepare audio, for each extraction process. 0: on a GPU one per free
    core, at most 16; without a GPU a single one, because the encoder needs the cores."""

    @property
    def cache_bytes(self) -> int:
        """`cache_gigabytes` in bytes."""
        return int(self.cache_gigabytes * 1e9)

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence if the local disk cannot hold two windows."""
        # Training reads one window while the shards of the next one are fetched.
        windows = 2 * self.window_shards * self.shard_megabytes / 1000
        if self.cache == "store" and self.cache_gigabytes < windows:
            yield (
                f"features.cache_gigabytes ({self.cache_gigabytes}) is too small for two windows of "
                f"features.window_shards ({self.window_shards}) × features.shard_megabytes "
                f"({self.shard_megabytes}): raise it to {windows:g}, or lower one of the other two."
            )


@dataclass
class Beginning:
    """A first part of the training, in which the projector learns without the LLM's layers.

    It shortens the plateau on which a projector with random weights otherwise stays. The projector learns by
    connectionist temporal classification (CTC) to spell the transcripts in the LLM's own token embeddings.
    """

    kind: Literal["none", "ctc"] = "none"
    """`ctc`: training begins with this part. `none`: it does not, as in the publication."""
    steps: int = bounded(2000, at_least=1)
    """Optimiser steps of the beginning. The steps of `training.epochs` and `training.max_steps` come after
    it."""
    until: float = bounded(0.0, at_least=0.0, at_most=1.0)
    """Token error rate on dev, as a fraction, at which the beginning ends before `steps`. It is measured at
    each validation (`training.validate_every`). 0: the beginning takes all of its steps."""
    learning_rate: float = bounded(1e-3, above=0)
    """Peak learning rate of the beginning. The rate rises over the first tenth of `steps`, and then falls to
    zero as a cosine. After the beginning, `training.learning_rate` applies, with a warm-up of its own."""
    distance_weight: float = bounded(1.0, at_least=0.0)
    """Final weight of a second loss, which draws outputs to the embeddings of the tokens that they stand for.
    The weight rises from zero. If the final weight is 0, outputs may lie where the LLM has never seen an
    embedding."""
    dropout: float = bounded(0.2, at_least=0.0, at_most=0.9)
    """Share of the features' values that are set to zero in the beginning."""
    keep_head: bool = False
    """Record CTC's head in the model's config.json, as `ctc_head`: its token ids, starting with the blank's,
    and its sharpness. With `projector.ctc_weight` above 0, the head is always recorded."""

    @property
    def active(self) -> bool:
        """Whether training has a beginning."""
        return self.kind != "none"


@dataclass
class Masks:
    """Spans of the features that are set to zero in training, drawn for each utterance in each step.

    They are SpecAugment's masks, but over the encoder's outputs, so that cached features can be used.
    """

    time_share: float = bounded(0.0, at_least=0.0, at_most=0.9)
    """Mean total length of the spans of frames, as a share of the utterance's frames. Spans may overlap, so
    fewer frames are masked: about 12 % at 0.13, and 60 % at 0.9. 0: no masks over time."""
    time_length: int = bounded(25, at_least=1)
    """Frames in the longest span. All lengths from 1 to this are equally likely. 25 frames of Whisper are
    half a second."""
    channel_share: float = bounded(0.0, at_least=0.0, at_most=0.9)
    """Mean total length of the spans of channels, as a share of the features' channels. They are masked in
    all of an utterance's frames. 0: no masks over channels."""
    channel_length: int = bounded(64, at_least=1)
    """Channels in the longest span. All lengths from 1 to this are equally likely."""

    @property
    def active(self) -> bool:
        """Whether there are any masks."""
        return self.time_share > 0 or self.channel_share > 0


@dataclass
class Projector:
    """The trained part between the encoder and the LLM."""

    kind: Literal["linear", "cov1d-linear", "q-former"] = "linear"
    """`linear` is the published architecture: each group of k consecutive frames is concatenated, then
    Linear, ReLU, Linear. `cov1d-linear` applies a convolution over k frames first. `q-former` turns audio of
    any length into a fixed number of positions."""
    downsampling: int = bounded(5, at_least=1)
    """k: encoder frames joined into one LLM position. 5 gives 10 positions per second; more is faster but
    blurs short words. A q-former ignores it."""
    hidden: int = bounded(2048, at_least=1)
    """Width between the two linear layers. A q-former ignores it."""
    queries: int = bounded(64, at_least=1)
    """LLM positions that a q-former outputs, whatever the length of the audio. The other kinds ignore it."""
    layers: int = bounded(8, at_least=1)
    """Layers of a q-former. The other kinds ignore it."""
    init_from: str = ""
    """A model folder, local or s3://, or the name of a shipped model: training starts from its projector,
    which must have the same kind and sizes, and with `llm.tuning: lora` also from its adapter, if it has one.
    Empty: random weights, drawn with the seed."""
    beginning: Beginning = field(default_factory=Beginning)
    dropout: float = bounded(0.0, at_least=0.0, at_most=0.9)
    """Share of the features' values that are set to zero in training, except in the beginning, which has its
    own share (`beginning.dropout`). It makes up for some of the variety that a few hours of speech lack."""
    masks: Masks = field(default_factory=Masks)
    ctc_weight: float = bounded(0.0, at_least=0.0)
    """Weight of CTC's loss, which is added to the LLM's loss after the beginning (or from the start, if there
    is none). Above 0, the projector's outputs must also spell the transcript, and decoding can use this
    spelling (`decoding.ctc_weight`). 0: the projector learns from the LLM's loss alone, as in the
    publication."""
    drop_blanks: float = bounded(0.0, at_least=0.0, at_most=1.0)
    """If above 0, positions at which CTC gives the blank at least this probability are removed before the
    LLM. The LLM then reads little more than one position per token, which takes less time. It needs a
    `ctc_weight` above 0. 0: the LLM reads every position, as in the publication."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence if CTC cannot train this kind of projector, or `drop_blanks` lacks CTC's loss."""
        if self.uses_ctc and self.kind == "q-former":
            yield (
                "CTC cannot train a q-former, whose positions do not follow the order of the audio: choose "
                "another projector.kind, or set projector.beginning.kind to none and projector.ctc_weight "
                "to 0."
            )
        if self.drop_blanks and not self.ctc_weight:
            yield (
                "projector.drop_blanks needs CTC's loss for as long as the projector learns: set "
                "projector.ctc_weight above 0 (0.5 is usual), or projector.drop_blanks to 0."
            )

    @property
    def uses_ctc(self) -> bool:
        """Whether any part of the training has CTC's loss."""
        return self.beginning.active or self.ctc_weight > 0


@dataclass
class Lora:
    """Low-rank adapters on the LLM, used if `llm.tuning` is `lora`."""

    rank: int = bounded(8, at_least=1)
    """r: rank of the adapter's matrices. A higher rank can learn more but needs more memory."""
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
    """Template of the LLM's input. The prompt replaces `{}`. The audio replaces `{audio}`; without `{audio}`,
    the audio comes before the text. `chat`: the model's own chat template, with the audio at the start of the
    user's turn."""
    answer_prefix: str = ""
    """Text that training puts before each transcript. If it is a space, the first word is tokenised as it is
    within a sentence, which is also how CTC spells it (`decoding.ctc_weight`). Spaces at the start of a
    hypothesis are removed; any other prefix remains."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the LLM may run in this program. Some models on the hub need their
    own code; transformers' own models do not. A model folder records the value but does not grant it to
    others: `decode`, `transcribe`, `serve` and `convert-checkpoint` need the option again."""
    tuning: Literal["frozen", "lora", "full"] = "frozen"
    """Which of the LLM's weights are trained: none, low-rank adapters, or all."""
    learning_rate: float | None = bounded(None, above=0)
    """Peak learning rate of the LLM, if it is trained. Default: training.learning_rate."""
    lora: Lora = field(default_factory=Lora)

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work, or that nothing uses."""
        yield from _unused_rate("llm", self)
        if self.tuning == "lora" and not self.lora.targets:
            yield "llm.lora.targets names no layer; give at least one, such as [q_proj, v_proj]."
        # The audio is one stretch of embeddings, so it can only be in one place.
        if self.template != "chat" and (self.template.count("{}") != 1 or self.template.count("{audio}") > 1):
            yield (
                f"llm.template is {self.template!r} but must contain {{}} once, "
                "for the prompt, and {audio} at most once; or be `chat`."
            )


def _unused_rate(name: str, section: Encoder | Llm) -> Iterator[str]:
    if section.tuning == "frozen" and section.learning_rate is not None:
        yield (
            f"{name}.learning_rate is set but {name}.tuning is frozen: "
            f"set {name}.tuning to what should be trained, or remove the learning rate."
        )
