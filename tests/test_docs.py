"""Every key, recipe, command and file that the documentation names exists, and the pages are easy to read."""

import ast
import copy
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from slam_asr.cli import COMMANDS, positionals_of, resolve_command
from slam_asr.cli import run as run_stage_command
from slam_asr.config.recipe import recipe_keys, recipe_values, shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "components").glob("*/README.md"),
        ROOT / "demo" / "README.md",
        *(ROOT / "slam_asr" / "projectors").glob("*/README.md"),
    ]
)
SLAM_LLM = ROOT / "docs" / "how-to" / "from-slam-llm.md"
SHIPPED_MODEL = "whisper-tiny.en-smollm2-135m"
MAX_README_LINES = 130
MAX_SENTENCES = 5

SECTIONS = sorted({key.partition(".")[0] for key in recipe_keys() if "." in key})
A_KEY = re.compile(rf"(?:--)?((?:{'|'.join(SECTIONS)})(?:\.\w+)+)(?:[:\s].*)?")
A_FILE = re.compile(r".*\.(?:py|yaml|json|jsonl|html|safetensors|pt)")
A_RECIPE = re.compile(r"(?:whisper|wavlm|hubert)-[\w.-]*(?:vicuna|llama)[\w-]*")

OPTIONS_OF_SLAM_LLM = """
    encoder_name encoder_path encoder_path_hf encoder_dim encoder_projector encoder_projector_ds_rate
    encoder_ds_rate encoder_type llm_name llm_path llm_type llm_dim normalize modal file model_factory
    dataset train_data_path val_data_path train_split test_split input_type mel_size prompt
    fix_length_audio inference_mode max_words max_mel data_path model_name enable_ddp enable_deepspeed
    enable_fsdp low_cpu_fsdp run_validation batch_size_training batching_strategy context_length
    gradient_accumulation_steps num_epochs num_workers_dataloader warmup_steps total_steps
    validation_interval lr weight_decay gamma seed use_fp16 mixed_precision val_batch_size use_peft
    output_dir freeze_layers num_freeze_layers quantization one_gpu save_model
    dist_checkpoint_root_folder dist_checkpoint_folder save_optimizer use_fast_kernels
    run_test_during_validation freeze_llm freeze_encoder peft_config.peft_method peft_config.r
    peft_config.lora_alpha peft_config.target_modules peft_config.bias peft_config.task_type
    peft_config.lora_dropout peft_config.inference_mode deepspeed_config sharding_strategy
    checkpoint_type fsdp_activation_checkpointing fsdp_cpu_offload pure_bf16 optimizer use_wandb
    wandb_dir wandb_entity_name wandb_project_name wandb_exp_name log_file log_interval ckpt_path
    peft_ckpt decode_log metric num_beams max_new_tokens repetition_penalty length_penalty
"""
SCRIPTS_OF_SLAM_LLM = """
    finetune_whisper_large_linear_vicuna_7b.sh finetune_wavlm_large_linear_vicuna_7b.sh
    finetune_hubert_xtralarge_linear_vicuna_7b.sh finetune_whisper_large_linear_vicuna_7b_deepspeed.sh
    decode_whisper_large_linear_vicuna_7b.sh decode_wavlm_large_linear_vicuna_7b.sh
    decode_hubert_xtralarge_linear_vicuna_7b.sh transcribe_deepspeed_to_pt.py zero_to_fp32.py
    compute_wer.py whisper_tn.py
"""


read_once = functools.cache(recipe_values)  # reading a recipe takes a fifth of a second


def page_id(page):
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def fenced_blocks(page):
    """Return (language, lines) of each fenced block; the language is empty if the fence names none."""
    blocks, lines = [], None
    for line in page.read_text().splitlines():
        if line.strip().startswith("```"):
            if lines is None:
                lines = []
                blocks.append((line.strip().removeprefix("```").strip(), lines))
            else:
                lines = None
        elif lines is not None:
            lines.append(line)
    assert lines is None, f"{page}: a fence is not closed"
    return blocks


def prose(page):
    """Return a page's text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def paragraphs(page):
    """Return paragraphs and list items, each as one line; tables, headings and comments are left out."""
    text = re.sub(r"<!--.*?-->", "", prose(page), flags=re.DOTALL)
    lines = ["" if re.match(r"\||#|!\[", line.strip()) else line for line in text.splitlines()]
    # Each list item counts as a paragraph.
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n", "\n".join(lines), flags=re.MULTILINE)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(paragraph):
    """Split a paragraph into sentences, at a full stop and a space before a capital or a code span."""
    return re.split(r"(?<=[.!?])[*`)”]*\s+(?=[*(“[]*[`A-Z0-9])", paragraph)


def headings(page):
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def code_spans(page):
    """Return the texts in backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def first_cells(page):
    """Return the code spans in the first column of a page's tables."""
    rows = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| ")]
    return {span for cell in rows for span in re.findall(r"`([^`]+)`", cell)}


def commands(page, program):
    """Return the commands of a program in a page's bash blocks, as lists of words."""
    lines = []
    for language, block in fenced_blocks(page):
        if language == "bash":
            lines += "\n".join(block).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


def every_command(program):
    """Return a decorator that parametrizes a test by (page, words), for each command on all pages."""
    found = [(page, words) for page in PAGES for words in commands(page, program)]
    names = [f"{page_id(page)}: {' '.join(words[: len(program.split()) + 1])}" for page, words in found]
    return pytest.mark.parametrize(("page", "words"), found, ids=names)


def given_options(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def test_every_option_and_script_of_slam_llm_has_a_counterpart():
    named = first_cells(SLAM_LLM)
    assert not set(OPTIONS_OF_SLAM_LLM.split()) - named
    assert not set(SCRIPTS_OF_SLAM_LLM.split()) - named


def test_a_key_is_distinguished_from_a_file_and_from_an_option_of_slam_llm():
    assert A_KEY.fullmatch("training.zero_stage: 3")[1] == "training.zero_stage"
    assert A_KEY.fullmatch("--llm.lora.rnak")[1] not in recipe_keys()
    assert A_FILE.fullmatch("projector.safetensors") and not A_KEY.fullmatch("train_config.lr")
    assert len(commands(SLAM_LLM, "slam-asr")) > 8 and len(code_spans(SLAM_LLM)) > 100


@every_page
def test_every_recipe_key_that_a_page_names_exists(page):
    named = {
        match[1]
        for span in code_spans(page)
        if (match := A_KEY.fullmatch(span)) and not A_FILE.fullmatch(span)
    }
    assert not named - set(recipe_keys())


@every_page
def test_every_recipe_that_a_page_names_ships(page):
    named = {span for span in code_spans(page) if A_RECIPE.fullmatch(span)}
    assert not named - shipped_recipes().keys()


@every_command("slam-asr")
def test_every_command_of_a_stage_has_real_options_and_all_that_it_needs(page, words, monkeypatch):
    command, _ = resolve_command(words[1], words[2:])
    assert command in COMMANDS
    module, name = COMMANDS[command].split(":")
    function, calls = getattr(importlib.import_module(module), name), []

    @functools.wraps(function)
    def record_call(**values):
        calls.append(values)

    monkeypatch.setattr(importlib.import_module(module), name, record_call)
    monkeypatch.setattr("slam_asr.cli.recipe_values", lambda recipe: copy.deepcopy(read_once(recipe)))
    # A model folder's recipe is read before the options are parsed.
    if "--model" in words:
        model = words.index("--model") + 1
        words = [*words[:model], SHIPPED_MODEL, *words[model + 1 :]]
    elif positionals_of(command) == "MODEL":
        words = [*words[:2], SHIPPED_MODEL, *words[3:]]
    redirected = words.index(">") if ">" in words else len(words)
    run_stage_command(words[1], words[2:redirected])
    assert calls


@every_command("slam-asr")
def test_every_command_of_a_stage_spells_options_as_its_help_does(page, words):
    assert not [option for option in given_options(words) if "_" in option and "." not in option]


@every_command("python -m pipelines")
def test_every_command_of_the_pipelines_has_real_options(page, words):
    command = " ".join(words[3:5]) if words[3] == "schedule" else words[3]
    if command == "run":
        _require_recipe(words[4])
    given = {option for option in given_options(words) if option.removeprefix("--") not in recipe_keys()}
    assert not given - options_of_pipelines()[command]


@functools.cache
def options_of_pipelines():
    """Return the options of each command of `python -m pipelines`, from the generated reference page."""
    text = (ROOT / "docs" / "reference" / "pipelines.md").read_text()
    sections = re.findall(r"^### python -m pipelines ([\w ]+)\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    return {command: set(re.findall(r"^\| `(--[\w-]+)`", table, re.MULTILINE)) for command, table in sections}


def _require_recipe(name):
    assert name.endswith(".yaml") or name in shipped_recipes()


@every_page
def test_every_link_of_a_page_leads_to_a_file_and_heading_that_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


@every_page
def test_every_test_that_a_page_names_exists(page):
    for span in code_spans(page):
        if match := re.fullmatch(r"(tests/[\w/]+\.py)(?:::(\w+))?", span):
            file, name = ROOT / match[1], match[2]
            assert file.is_file() and (not name or f"\ndef {name}(" in file.read_text("utf-8")), span


@every_page
def test_every_code_block_names_its_language(page):
    assert all(language for language, _ in fenced_blocks(page))
    assert not re.search(r"^    (?:slam-asr|python|make|docker|kubectl) ", prose(page), re.MULTILINE), (
        "an indented block of commands: fence it with ```bash"
    )


@every_page
def test_no_paragraph_has_more_than_five_sentences(page):
    long = [p for p in paragraphs(page) if len(sentences(p)) > MAX_SENTENCES]
    assert not long


def test_sentences_are_counted_at_full_stops_before_a_capital_or_code():
    assert len(sentences("One of 2.5 s. Two (e.g. this)? `three` begins with code. Four!")) == 4
    assert len(sentences("It has **bold.** *Next* one. [A link](x.md) follows.")) == 3


def test_the_readme_is_short_enough_to_be_read_at_once():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


@every_page
def test_every_python_example_parses_and_imports_names_that_exist(page):
    for language, lines in fenced_blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_documentations_index_links_every_tutorial_every_how_to_and_the_start_of_each_folder():
    index = ROOT / "docs" / "README.md"
    pages = {
        *(ROOT / "docs" / "tutorials").glob("*.md"),
        *(ROOT / "docs" / "how-to").glob("*.md"),
        *(ROOT / "docs").glob("*/README.md"),
        ROOT / "docs" / "glossary.md",
    }
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", index.read_text())}
    assert not pages - linked


def test_the_readme_leads_to_the_page_for_users_of_slam_llm():
    assert "(docs/how-to/from-slam-llm.md)" in (ROOT / "README.md").read_text()
