"""In a folder of `--to huggingface`, transformers' `generate` adds CTC's scores as `slam-asr decode` does."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from slam_asr.artifacts.model_folder import CTC_HEAD
from slam_asr.config.recipe import load_recipe
from slam_asr.conversion.ctc_head import ctc_options
from slam_asr.conversion.huggingface.configuration_slam_asr import SlamAsrConfig
from slam_asr.conversion.huggingface.ctc_slam_asr import CtcPrefixProcessor
from slam_asr.conversion.huggingface.modeling_slam_asr import SlamAsrForConditionalGeneration
from slam_asr.conversion.huggingface.processing_slam_asr import SlamAsrProcessor
from slam_asr.conversion.huggingface_folder import SOURCES
from slam_asr.decoding.model import open_model
from slam_asr.errors import ConfigurationError
from slam_asr.generation import ctc_prefix
from slam_asr.generation.ctc_prefix import CtcScorer, CtcSpelling
from slam_asr.models.ctc_vocabulary import CtcVocabulary
from slam_asr.models.llm import load_tokenizer
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from tests.conftest import tiny_llama
from tests.conversion.test_huggingface import (
    decoded,
    decoded_by_transformers,
    trained,
    utterances,
)

SETTINGS = ((1, 1), (1, 3), (4, 1), (4, 3))
"""Numbers of beams, and of utterances per batch."""
WEIGHT = 0.4
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    """A tiny LLM whose texts depend on the audio. Its tokens are single bytes, and letters after a space."""
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    model = tiny_llama(folder, [("Ġ", letter) for letter in LETTERS])
    for name, weight in model.named_parameters():
        weight.data *= 10 if "_proj" in name else 1
    model.save_pretrained(folder)
    return str(folder)


def head_of(llm: str, sharpness: float = 1.0) -> dict:
    """Return a CTC head that knows most of the LLM's tokens."""
    tokenizer = load_tokenizer(Path(llm))
    (blank,) = tokenizer.encode("\n", add_special_tokens=False)
    others = [token for token in range(2, len(tokenizer)) if token % 7 and token != blank]
    return {"tokens": [blank, *others], "sharpness": sharpness}


def head_logits(model: str) -> torch.Tensor:
    """CTC's logits of all utterances, [positions, 1 + tokens]."""
    opened = open_model(model)
    slam = opened.load(replace(opened.trained.decoding, ctc_weight=WEIGHT), with_encoder=True)
    prepare = opened.spec.preparer()
    positions = [opened.positions(opened.spec.span_of(len(wave))) for wave in utterances()]
    with torch.no_grad():
        outputs = slam.projector(slam.encode([prepare(wave) for wave in utterances()]), positions)
        return slam.speller.head(outputs.float())


def add_to_config(model: str, head: dict | None = None, **recipe: tuple[str, str]) -> None:
    """Write a CTC head into config.json, as a training run does, and replace pieces of the recipe there."""
    file = Path(model) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if head:
        config["training"][CTC_HEAD] = head
    for old, new in recipe.values():
        assert config["recipe"].count(old) == 1
        config["recipe"] = config["recipe"].replace(old, new)
    file.write_text(json.dumps(config), encoding="utf-8")


def exported(tiny_recipe, llm: str, folder: Path, blanks: bool = False, **options) -> tuple[str, str]:
    """Return a model folder with a CTC head, and the folder that is exported from it."""
    options = {"llm.name": llm, "projector.ctc_weight": 0.5, "decoding.ctc_weight": WEIGHT} | options
    options |= {"projector.drop_blanks": 0.5} if blanks else {}
    recipe, file = trained(tiny_recipe, folder, "whisper-speech", **options)
    model = convert_checkpoint(file, str(folder / "model"), recipe=recipe, verify=False).folder
    add_to_config(model, head_of(llm))
    # With this sharpness, CTC prefers some tokens, but rules out none.
    add_to_config(model, head_of(llm, 2 / float(head_logits(model).std(1).mean())))
    if blanks:
        # One to two thirds of the positions are left out. The threshold is in a gap: rounding decides none.
        probabilities = head_logits(model).softmax(1)[:, 0].sort().values
        middle = slice(len(probabilities) // 3, 2 * len(probabilities) // 3)
        gap = middle.start + int(probabilities[middle].diff().argmax())
        threshold = float(probabilities[gap : gap + 2].mean())
        add_to_config(model, threshold=("drop_blanks: 0.5", f"drop_blanks: {threshold:.12e}"))
    return model, convert_checkpoint(model, str(folder / "exported"), to="huggingface", verify=False).folder


@pytest.mark.parametrize(
    ("blanks", "options"),
    [
        (False, {"decoding.repetition_penalty": 1.0}),
        (True, {"llm.answer_prefix": " "}),
    ],
)
def test_transformers_generate_gives_the_token_ids_of_decode(tiny_recipe, llm, tmp_path, blanks, options):
    model, folder = exported(tiny_recipe, llm, tmp_path, blanks, **options)
    expected = decoded(model, *SETTINGS)
    assert decoded_by_transformers(folder, *SETTINGS) == expected
    alone = decoded(model, *SETTINGS, ctc_weight=0.0)
    assert all(a != b for a, b in zip(alone, expected, strict=True)), "CTC's scores must matter"
    assert decoded_by_transformers(folder, *SETTINGS, ctc_weight=0.0) == alone
    assert decoded_by_transformers(folder, (4, 3), ctc_weight=0.8) == decoded(model, (4, 3), ctc_weight=0.8)


def test_in_bf16_most_answers_are_those_of_decode(tiny_recipe, llm, tmp_path):
    """The two searches attend to audio and prompt in different ways, so bf16 rounds differently in them."""
    model, folder = exported(tiny_recipe, llm, tmp_path, **{"decoding.precision": "bf16"})
    expected, found = decoded(model, (1, 3), (4, 3)), decoded_by_transformers(folder, (1, 3), (4, 3))
    alone = decoded(model, (1, 3), (4, 3), ctc_weight=0.0)
    for answers, others, without in zip(expected, found, alone, strict=True):
        same = [a == b for a, b in zip(answers, others, strict=True)]
        assert sum(same) >= len(same) - 2, (answers, others)
        assert sum(a == b for a, b in zip(answers, without, strict=True)) < len(same) - 2


def test_a_model_without_a_ctc_head_decodes_with_the_llm_alone(tiny_recipe, llm, tmp_path, capsys):
    recipe, file = trained(
        tiny_recipe, tmp_path, "whisper-speech", **{"llm.name": llm, "decoding.ctc_weight": WEIGHT}
    )
    model = convert_checkpoint(file, str(tmp_path / "model"), recipe=recipe, verify=False).folder
    folder = convert_checkpoint(model, str(tmp_path / "exported"), to="huggingface", verify=False).folder
    assert "no CTC head, so decoding.ctc_weight (0.4) is left out" in "".join(capsys.readouterr())
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    assert "This folder decodes with the LLM alone." in card and "ctc_weight=0.0" not in card
    settings = ((1, 3), (4, 3))
    assert decoded_by_transformers(folder, *settings) == decoded(model, *settings, ctc_weight=0.0)
    with pytest.raises(ValueError, match=r"ctc_weight is 0\.3, but this model has no CTC head: leave it out"):
        decoded_by_transformers(folder, (1, 3), ctc_weight=0.3)


def test_a_recipe_without_ctcs_scores_is_exported_with_the_head(tiny_recipe, llm, tmp_path):
    model, folder = exported(tiny_recipe, llm, tmp_path, **{"decoding.ctc_weight": 0.0})
    expected = decoded(model, (4, 3), ctc_weight=WEIGHT)
    assert decoded_by_transformers(folder, (4, 3)) == decoded(model, (4, 3)) != expected
    assert decoded_by_transformers(folder, (4, 3), ctc_weight=WEIGHT) == expected
    with pytest.raises(ValueError, match=r"ctc_weight is 1\.5: give a number from 0 to 0\.9"):
        decoded_by_transformers(folder, (4, 3), ctc_weight=1.5)
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    assert "CTC" not in card


def test_several_answers_and_samples_follow_their_own_utterances(tiny_recipe, llm, tmp_path):
    """With several answers per utterance, the best one is that of a search for one answer."""
    folder = exported(tiny_recipe, llm, tmp_path)[1]
    processor = SlamAsrProcessor.from_pretrained(folder, trust_remote_code=False)
    model = SlamAsrForConditionalGeneration.from_pretrained(folder)
    inputs = processor.apply_transcription_request(audio=utterances()[:3])
    best = model.generate(**inputs, num_beams=4)
    several = model.generate(**inputs, num_beams=4, num_return_sequences=2)
    width = min(best.shape[1], several.shape[1])
    assert torch.equal(several[::2, :width], best[:, :width])
    greedy = model.generate(**inputs, num_beams=1)
    # So low a temperature leaves no choice, even between logits that are nearly equal.
    samples = model.generate(**inputs, num_beams=1, do_sample=True, temperature=1e-7, num_return_sequences=2)
    assert torch.equal(samples[::2], greedy) and torch.equal(samples[1::2], greedy)


def processor_of(logits: torch.Tensor, positions: list[int], beams: int) -> CtcPrefixProcessor:
    config = SlamAsrConfig(ctc_tokens=[9, 5, 7], ctc_first_tokens=[-1, 6, -1])
    generation = GenerationConfig(num_beams=beams, eos_token_id=[1])
    return CtcPrefixProcessor(logits, positions, config, 0.5, generation)


def test_rows_are_scored_by_their_own_tokens_in_whatever_order_they_come():
    torch.manual_seed(0)
    logits, positions, beams = torch.randn(5 + 3, 3), [5, 3], 3
    columns = torch.tensor([-1, -1, -1, -1, -1, 1, -1, 2, -1, -1])
    first = columns.clone()
    first[6] = 1
    scorer = CtcScorer(CtcSpelling.of(logits, positions, columns, first), 0.5, beams, torch.tensor([1]))
    processor = processor_of(logits, positions, beams)
    ids = torch.zeros(6, 0, dtype=torch.long)
    for _ in range(6):
        scores = torch.randn(6, 10).log_softmax(1)
        expected = scorer.add(scores.view(2, beams, 10)).flatten(0, 1)
        assert torch.equal(processor(ids, scores), expected)
        # A processor that starts here has to follow the hypotheses from their first token.
        torch.testing.assert_close(processor_of(logits, positions, beams)(ids, scores), expected)
        continued = torch.cat([torch.randint(3, (3,)), torch.randint(3, 6, (3,))])
        tokens = torch.tensor([5, 6, 7, 2, 1, 5, 7])[torch.randint(7, (6,))]
        scorer.advance(continued, tokens)
        ids = torch.cat([ids[continued], tokens[:, None]], 1)


def test_logits_of_greedy_search_are_normalised():
    """Otherwise the scores that `generate` returns would be no log probabilities."""
    torch.manual_seed(0)
    logits, ids, scores = torch.randn(5 + 3, 3), torch.zeros(2, 0, dtype=torch.long), torch.randn(2, 10)
    expected = processor_of(logits, [5, 3], 1)(ids, scores.log_softmax(1))
    torch.testing.assert_close(processor_of(logits, [5, 3], 1)(ids, scores + 5), expected)
    assert bool((expected < 0).all())
    # Beam search gives log probabilities, some lowered by a repetition penalty. They stay as they are.
    lowered = processor_of(logits[:5], [5], 2)(ids, scores.log_softmax(1) - 1)
    normal = processor_of(logits[:5], [5], 2)(ids, scores.log_softmax(1))
    torch.testing.assert_close(lowered, normal - 0.5)


@pytest.mark.parametrize("prefix", ["", " "])
def test_the_folder_has_the_columns_of_the_first_token(tiny_recipe, llm, prefix):
    head = head_of(llm)
    recipe = load_recipe(str(tiny_recipe), {"llm.name": llm})
    recipe = replace(recipe, llm=replace(recipe.llm, answer_prefix=prefix))
    parts = SimpleNamespace(recipe=recipe, content=SimpleNamespace(facts={CTC_HEAD: head}), where="model")
    config = SlamAsrConfig(**ctc_options(parts))
    tokenizer = load_tokenizer(Path(llm))
    within, first = CtcVocabulary(tokenizer, head["tokens"]).columns(len(tokenizer))
    assert not torch.equal(within, first)
    processor = CtcPrefixProcessor(torch.zeros(0, 32), [0], config, 0.5, GenerationConfig())
    found = processor._columns(len(tokenizer), torch.device("cpu"))
    assert torch.equal(found[0], within) and torch.equal(found[1], within if prefix else first)


def test_the_search_of_the_folder_is_the_file_of_this_project(tiny_recipe, llm, tmp_path):
    folder = Path(exported(tiny_recipe, llm, tmp_path)[1])
    assert {file.name for file in folder.glob("*.py")} == SOURCES.keys()
    own = Path(ctc_prefix.__file__).read_text(encoding="utf-8")
    assert (folder / "ctc_prefix_slam_asr.py").read_text(encoding="utf-8") == own
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "with a share of 0.4" in card and "## Without CTC" not in card


def test_a_folder_is_not_taken_for_one_with_other_code(tiny_recipe, llm, tmp_path, monkeypatch):
    model, folder = exported(tiny_recipe, llm, tmp_path)
    changed = tmp_path / "changed.py"
    changed.write_bytes(Path(ctc_prefix.__file__).read_bytes() + b"# another version\n")
    monkeypatch.setitem(SOURCES, "ctc_prefix_slam_asr.py", changed)
    with pytest.raises(ConfigurationError, match=r"with other inputs \(changed: code\)"):
        convert_checkpoint(model, folder, to="huggingface", verify=False)
    convert_checkpoint(model, folder, to="huggingface", verify=False, overwrite=True)
    assert (Path(folder) / "ctc_prefix_slam_asr.py").read_bytes() == changed.read_bytes()
