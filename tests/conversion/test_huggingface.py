"""With a folder of `--to huggingface`, transformers alone decodes to the same token ids as this project."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoConfig, AutoModel, AutoTokenizer

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.model_folder import CTC_HEAD, fetch_model, read_config
from slam_asr.config.recipe import load_recipe
from slam_asr.conversion.huggingface.modeling_slam_asr import SlamAsrForConditionalGeneration
from slam_asr.conversion.huggingface.processing_slam_asr import SlamAsrProcessor
from slam_asr.conversion.huggingface_folder import SOURCES
from slam_asr.conversion.model_card import model_card
from slam_asr.conversion.sources import Content
from slam_asr.decoding.model import open_model
from slam_asr.errors import ModelError, UserError
from slam_asr.models.llm import load_llm
from slam_asr.models.projector import build_projector
from slam_asr.models.prompt import Prompt
from slam_asr.models.searcher import Searcher
from slam_asr.scoring.report import write_report
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from tests.conversion.test_slam_llm import lora_weights
from tests.models.test_encoders import waves, write_waveform_model

PROGRAM = Path(__file__).parent / "elsewhere_program.py"
SECONDS = (0.9, 0.31, 2.0, 1.37, 0.02, 0.7, 2.6, 0.5)
"""Lengths of the utterances in seconds. One is too short for a frame of a waveform encoder, and one is longer
than 2 s, the window of the Whisper that `trained` writes."""
OPTIONS_OF_KIND = {
    "whisper-all": {"encoder.frames": "all"},
    "whisper-speech": {
        "encoder.long_audio": "split",
        "features.dtype": "bf16",
        "decoding.repetition_penalty": 1.3,
    },
    "wavlm": {"llm.template": "<s>{audio}\nUSER: {}\n ASSISTANT:", "projector.kind": "cov1d-linear"},
    "hubert": {"llm.tuning": "lora", "llm.lora.rank": 2, "features.dtype": "fp8"},
}


@pytest.fixture(scope="module")
def llm(tiny_models, tmp_path_factory) -> str:
    """The tiny LLM with larger weights, so that its texts depend on the audio."""
    folder = shutil.copytree(tiny_models["llm"], tmp_path_factory.mktemp("sensitive") / "llm")
    model = load_llm(folder, torch.float32)
    for name, weight in model.named_parameters():
        weight.data *= 10 if "_proj" in name else 1
    model.save_pretrained(folder)
    return str(folder)


def trained(tiny_recipe, folder: Path, kind: str, **overrides):
    """Return a recipe and the path of a checkpoint with weights so large that texts depend on the audio."""
    encoder, width = folder / "encoder", 16 if kind.startswith("whisper") else 32
    if kind.startswith("whisper"):
        config = AutoConfig.from_pretrained(load_recipe(str(tiny_recipe)).encoder.name)
        config.max_source_positions = 100
        torch.manual_seed(1)
        model = AutoModel.from_config(config)
        model.encoder.conv1.weight.data *= 50  # otherwise only a frame's position would matter
        model.save_pretrained(encoder)
    else:
        write_waveform_model(encoder, kind, "base" if kind == "wavlm" else "large")
    options = {"decoding.max_new_tokens": 8, "encoder.name": str(encoder)} | OPTIONS_OF_KIND[kind] | overrides
    recipe = load_recipe(str(tiny_recipe), options)
    weights = {
        f"encoder_projector.{name}": 30 * tensor
        for name, tensor in build_projector(recipe.projector, width, 16, seed=3).state_dict().items()
    }
    adapter = lora_weights(recipe) if recipe.llm.tuning == "lora" else {}
    more = {name: 0.1 * tensor for name, tensor in adapter.items()}
    torch.save(weights | more, folder / "model.pt")
    return recipe, str(folder / "model.pt")


def utterances() -> list[np.ndarray]:
    return waves(SECONDS)


SETTINGS = ((1, 1), (1, 8), (4, 1), (4, 8))
"""Numbers of beams, and of utterances per batch."""


def decoded(model: str, *settings: tuple[int, int], **options) -> list[list[list[int]]]:
    """Decode with this project's search; return the token ids of each utterance, for each setting.

    The options replace those of the model's recipe.
    """
    opened = open_model(model)
    prompt, prepare = opened.prompt(), opened.spec.preparer()
    decoding = replace(opened.trained.decoding, **options)
    slam, found = opened.load(decoding, with_encoder=True), []
    for beams, batch in settings:
        searcher = Searcher(slam, prompt, replace(decoding, beams=beams))
        answers = [
            answer
            for group in in_batches(batch)
            for answer in searcher.decode(
                [prepare(wave) for wave in group],
                [opened.positions(opened.spec.span_of(len(wave))) for wave in group],
            )
        ]
        found.append([up_to_end(answer.ids, prompt.stops) for answer in answers])
    return found


def decoded_by_transformers(folder: str, *settings: tuple[int, int], **options) -> list[list[list[int]]]:
    """Do the same as `decoded`, with transformers and the exported folder; the options are `generate`'s."""
    processor = SlamAsrProcessor.from_pretrained(folder, trust_remote_code=False)
    model = SlamAsrForConditionalGeneration.from_pretrained(folder)
    found = []
    for beams, batch in settings:
        answers = []
        for group in in_batches(batch):
            inputs = processor.apply_transcription_request(audio=group)
            sequences = model.generate(**inputs, num_beams=beams, **options)
            answers += sequences[:, inputs["input_ids"].shape[1] :].tolist()
        found.append([up_to_end(ids, model.generation_config.eos_token_id) for ids in answers])
    return found


def in_batches(size: int) -> list[list[np.ndarray]]:
    waves = utterances()
    return [waves[i : i + size] for i in range(0, len(waves), size)]


def up_to_end(ids: list[int], stops: list[int]) -> list[int]:
    """Return token ids up to and including the first one that ends an answer."""
    ends = [i for i, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else ids


@pytest.mark.parametrize(
    "kind",
    [
        "whisper-speech",
        "wavlm",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("whisper-all", "hubert")),
    ],
)
def test_an_exported_folder_decodes_to_the_same_token_ids(tiny_recipe, llm, tmp_path, kind):
    recipe, file = trained(tiny_recipe, tmp_path, kind, **{"llm.name": llm})
    model = convert_checkpoint(file, str(tmp_path / "model"), recipe=recipe, verify=False)
    folder = convert_checkpoint(
        model.folder, str(tmp_path / "exported"), to="huggingface", verify=False
    ).folder
    for expected, found in zip(
        decoded(model.folder, *SETTINGS), decoded_by_transformers(folder, *SETTINGS), strict=True
    ):
        assert found == expected
        assert len({tuple(ids) for ids in expected}) > 1, "the texts must depend on the audio"


def test_an_exported_folder_leaves_out_the_same_blanks(tiny_recipe, llm, tmp_path):
    options = {"llm.name": llm, "projector.ctc_weight": 0.5, "projector.drop_blanks": 0.5}
    recipe, file = trained(tiny_recipe, tmp_path, "whisper-speech", **options)
    model = convert_checkpoint(file, str(tmp_path / "model"), recipe=recipe, verify=False)
    with pytest.raises(ModelError, match=r"has no CTC head: convert a checkpoint of the finished"):
        open_model(model.folder).load(recipe.decoding, with_encoder=True)
    with pytest.raises(ModelError, match=r"has no CTC head, which projector\.drop_blanks \(0\.5\) needs"):
        convert_checkpoint(model.folder, str(tmp_path / "headless"), to="huggingface", verify=False)
    # A file of weights has no head; a training run records it.
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["training"][CTC_HEAD] = {"tokens": [5, 9, 40], "sharpness": 0.01}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # The threshold is in the widest gap within the middle half of the probabilities. At least a quarter of
    # the positions is then left out, at least a quarter is not, and rounding decides about none.
    probabilities = blank_probabilities(model.folder).sort().values
    middle = slice(len(probabilities) // 4, 3 * len(probabilities) // 4)
    gap = middle.start + int(probabilities[middle].diff().argmax())
    threshold = float(probabilities[gap : gap + 2].mean())
    config["recipe"] = config["recipe"].replace("drop_blanks: 0.5", f"drop_blanks: {threshold:.12e}")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = convert_checkpoint(
        model.folder, str(tmp_path / "exported"), to="huggingface", verify=False
    ).folder
    expected = decoded(model.folder, *SETTINGS)
    assert decoded_by_transformers(folder, *SETTINGS) == expected
    exported = SlamAsrForConditionalGeneration.from_pretrained(folder)
    exported.config.drop_blanks = 0.0
    exported.save_pretrained(folder)
    assert decoded_by_transformers(folder, *SETTINGS) != expected, "the blanks must matter"


def blank_probabilities(model: str) -> torch.Tensor:
    """Probability of the blank at each position of all utterances, [positions]."""
    opened = open_model(model)
    slam, prepare = opened.load(opened.trained.decoding, with_encoder=True), opened.spec.preparer()
    positions = [opened.positions(opened.spec.span_of(len(wave))) for wave in utterances()]
    with torch.no_grad():
        outputs = slam.projector(slam.encode([prepare(wave) for wave in utterances()]), positions)
        return slam.blank_filter.head(outputs).softmax(1)[:, 0]


def test_the_sources_import_only_the_standard_library_and_five_packages():
    allowed = {"torch", "transformers", "safetensors", "numpy", "soxr"} | sys.stdlib_module_names
    assert len(SOURCES) == 9
    for file in SOURCES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in allowed, (file.name, node.module)
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file.name


def add_bos(folder: str | Path):
    """Make the tokenizer in a folder begin each text with bos, as Llama's does; return the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("a")[0] == tokenizer.bos_token_id
    return tokenizer


TRIMMING = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("template", ["USER: {}\n ASSISTANT:", 'é "{audio}" \\ 😀 {}\n\n', "chat"])
def test_other_prompts_have_the_ids_that_training_would_give_them(
    tiny_recipe, tiny_models, tmp_path, template
):
    llm = shutil.copytree(tiny_models["llm"], tmp_path / "llm")
    tokenizer = add_bos(llm)
    tokenizer.chat_template = TRIMMING
    tokenizer.save_pretrained(llm)
    recipe, file = trained(
        tiny_recipe, tmp_path, "whisper-speech", **{"llm.name": str(llm), "llm.template": template}
    )
    folder = convert_checkpoint(
        file, str(tmp_path / "exported"), to="huggingface", recipe=recipe, verify=False
    ).folder
    processor = SlamAsrProcessor.from_pretrained(folder, trust_remote_code=False)
    for text in ("Transcribe speech to text. ", "Écris ça ! "):
        prompt = Prompt(tokenizer, replace(recipe.llm, prompt=text)).main
        inputs = processor.apply_transcription_request(np.zeros(16_000, np.float32), prompt=text)
        assert inputs["input_ids"][0].tolist() == [
            *prompt.before,
            *[processor.audio_token_id] * 10,
            *prompt.ids,
        ]


@pytest.mark.slow
def test_a_complete_folder_needs_no_other_folder(tiny_recipe, tiny_models, tmp_path):
    places = {part: str(shutil.copytree(tiny_models[part], tmp_path / part)) for part in tiny_models}
    overrides = {f"{part}.name": place for part, place in places.items()}
    recipe, file = trained(tiny_recipe, tmp_path, "whisper-speech", **overrides)
    small, complete = (
        convert_checkpoint(
            file, str(tmp_path / f"{everything}"), to="huggingface", recipe=recipe, complete=everything
        ).folder
        for everything in (False, True)
    )
    expected = decoded_by_transformers(small, (1, 8))
    for place in places.values():
        shutil.rmtree(place)
    with pytest.raises(OSError, match=r"The encoder .* cannot be loaded: .* give encoder_name=…"):
        decoded_by_transformers(small, (1, 8))
    assert decoded_by_transformers(complete, (1, 8)) == expected
    model = SlamAsrForConditionalGeneration.from_pretrained(
        small, encoder_name=tiny_models["encoder"], llm_name=tiny_models["llm"]
    )
    model.save_pretrained(tmp_path / "saved")
    first, second = (load_file(Path(f) / "model.safetensors") for f in (small, tmp_path / "saved"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.slow
def test_the_loss_is_the_cross_entropy_of_the_labels(tiny_recipe, tmp_path):
    recipe, file = trained(tiny_recipe, tmp_path, "whisper-speech")
    folder = convert_checkpoint(
        file, str(tmp_path / "exported"), to="huggingface", recipe=recipe, verify=False
    ).folder
    processor = SlamAsrProcessor.from_pretrained(folder, trust_remote_code=False)
    model = SlamAsrForConditionalGeneration.from_pretrained(folder)
    inputs = processor.apply_transcription_request(utterances()[:2])
    logits = model(**inputs).logits
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.audio_token_id, -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


@pytest.mark.slow
def test_the_card_has_the_reports_rates_controls_data_and_licences(tiny_recipe, tmp_path):
    recipe, file = trained(tiny_recipe, tmp_path, "whisper-speech")
    rows = [Hypothesis(f"k{i}", "one two", "one two" if i else "one", "test-tiny") for i in range(8)]
    controls = {"empty output": [replace(row, hypothesis="") for row in rows]}
    facts = {"recipe": "tiny", "encoder": recipe.encoder.name, "llm": recipe.llm.name}
    write_report(tmp_path / "report", recipe, rows, controls, facts, {"beams": 4})
    folder = convert_checkpoint(
        file, str(tmp_path / "exported"), to="huggingface", recipe=recipe, report=str(tmp_path / "report")
    ).folder
    _, front, text = (Path(folder) / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    (result,) = yaml.safe_load(front)["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "wer", "value": 6.25}]
    for part in ("6.25 %", "100.00 %", "95 % interval", "4 beams", "train-tiny", "| LLM, `", "Apache-2.0"):
        assert part in text, part
    assert recipe.llm.name in text and 'apply_transcription_request(audio=["' in text

    write_report(tmp_path / "other", recipe, rows, controls, facts | {"llm": "another"}, {})
    with pytest.raises(UserError, match="is the report of another model than"):
        convert_checkpoint(
            file, str(tmp_path / "o"), to="huggingface", recipe=recipe, report=str(tmp_path / "other")
        )
    with pytest.raises(UserError, match=r"holds no wer\.json"):
        convert_checkpoint(file, str(tmp_path / "o"), to="huggingface", recipe=recipe, report=str(tmp_path))


def test_rates_that_were_measured_with_ctc_are_shown_only_if_the_folder_uses_it():
    def card_of(name: str, ctc_weight: float) -> tuple[dict, str]:
        # Read without its base models, which may not be on this machine. A card does not depend on weights.
        folder = fetch_model(name)
        config = read_config(folder)
        content = Content({}, config.typed_recipe, {}, config.training, str(folder))
        _, front, text = model_card(content, "## Use", None, ctc_weight).split("---\n", 2)
        return yaml.safe_load(front), text

    front, text = card_of("whisper-base-smollm2-135m", 0.0)
    assert "model-index" not in front and front["base_model"][0] == "openai/whisper-base"
    assert "33.30 %" in text and "This folder decodes with the LLM alone." in text
    for name, weight in (("whisper-base-smollm2-135m", 0.3), ("whisper-tiny.en-smollm2-135m", 0.0)):
        front, text = card_of(name, weight)
        assert front["model-index"] and "decodes with the LLM alone" not in text


def test_options_that_have_no_effect_and_code_of_an_llm_are_refused(tiny_recipe, tmp_path):
    recipe, file = trained(tiny_recipe, tmp_path, "whisper-speech")
    output = str(tmp_path / "output")
    with pytest.raises(UserError, match="--complete true is only for --to huggingface"):
        convert_checkpoint(file, output, recipe=recipe, complete=True)
    with pytest.raises(UserError, match="--report is only for --to huggingface"):
        convert_checkpoint(file, output, recipe=recipe, report=output)
    trusting = replace(recipe, llm=replace(recipe.llm, trust_remote_code=True))
    with pytest.raises(UserError, match="which --to huggingface does not export"):
        convert_checkpoint(file, output, to="huggingface", recipe=trusting)


@pytest.mark.slow
@pytest.mark.cold
def test_an_exported_folder_runs_without_slam_asr(tiny_recipe, llm, tmp_path):
    recipe, file = trained(tiny_recipe, tmp_path, "whisper-speech", **{"llm.name": llm})
    model = convert_checkpoint(file, str(tmp_path / "model"), recipe=recipe).folder
    folder = convert_checkpoint(model, str(tmp_path / "exported"), to="huggingface", complete=True).folder
    for index, wave in enumerate(utterances()):
        (tmp_path / "audio").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "audio" / f"{index}.wav", wave, 16_000, subtype="FLOAT")
    prompt = open_model(model).prompt()
    one_by_one, expected = (
        [prompt.answer_of(ids) for ids in answers] for answers in decoded(model, (1, 1), (1, 8))
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SLAM_ASR"))
    }
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", str(PROGRAM), folder, str(tmp_path / "audio")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["slam_asr"]
    assert found["model"] == found["batched"] == expected
    assert found["pipeline"] == one_by_one
    assert expected[0].startswith(found["bytes"]) and len(found["bytes"]) <= 3
    assert "trust_remote_code=True" in found["untrusted"]
