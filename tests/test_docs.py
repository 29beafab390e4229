"""The documentation: every key, recipe, command and file that it names exists."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

from slam_asr.cli import COMMANDS, command_of, spelt_out
from slam_asr.recipe import recipe_keys, shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SLAM_LLM = ROOT / "docs" / "from-slam-llm.md"

SECTIONS = sorted({key.partition(".")[0] for key in recipe_keys() if "." in key})
A_KEY = re.compile(rf"(?:--)?((?:{'|'.join(SECTIONS)})(?:\.\w+)+)(?:[:\s].*)?")
A_FILE = re.compile(r".*\.(?:py|yaml|json|jsonl|html|safetensors|pt)")
A_RECIPE = re.compile(r"(?:whisper|wavlm|hubert)-[\w.-]*(?:vicuna|llama)[\w-]*")

PIPELINE_OPTIONS = {
    "--corpus",
    "--model",
    "--sweep",
    "--parallel",
    "--output",
    "--store",
    "--runner",
    "--only",
    "--images",
    "--network",
    "--gpus",
    "--shared_memory",
    "--mounts",
}
OPTIONS_OF_SLAM_LLM = """
    encoder_name encoder_path encoder_path_hf encoder_dim encoder_projector encoder_projector_ds_rate encoder_ds_rate
    encoder_type llm_name llm_path llm_type llm_dim normalize modal file model_factory
    dataset train_data_path val_data_path train_split test_split input_type mel_size prompt fix_length_audio
    inference_mode max_words max_mel data_path
    model_name enable_ddp enable_deepspeed enable_fsdp low_cpu_fsdp run_validation batch_size_training batching_strategy
    context_length gradient_accumulation_steps num_epochs num_workers_dataloader warmup_steps total_steps
    validation_interval lr weight_decay gamma seed use_fp16 mixed_precision val_batch_size use_peft output_dir
    freeze_layers num_freeze_layers quantization one_gpu save_model dist_checkpoint_root_folder dist_checkpoint_folder
    save_optimizer use_fast_kernels run_test_during_validation freeze_llm freeze_encoder
    peft_config.peft_method peft_config.r peft_config.lora_alpha peft_config.target_modules peft_config.bias
    peft_config.task_type peft_config.lora_dropout peft_config.inference_mode
    deepspeed_config sharding_strategy checkpoint_type fsdp_activation_checkpointing fsdp_cpu_offload pure_bf16
    optimizer use_wandb wandb_dir wandb_entity_name wandb_project_name wandb_exp_name log_file log_interval
    ckpt_path peft_ckpt decode_log metric num_beams max_new_tokens repetition_penalty length_penalty
"""
SCRIPTS_OF_SLAM_LLM = """
    finetune_whisper_large_linear_vicuna_7b.sh finetune_wavlm_large_linear_vicuna_7b.sh
    finetune_hubert_xtralarge_linear_vicuna_7b.sh finetune_whisper_large_linear_vicuna_7b_deepspeed.sh
    decode_whisper_large_linear_vicuna_7b.sh decode_wavlm_large_linear_vicuna_7b.sh
    decode_hubert_xtralarge_linear_vicuna_7b.sh transcribe_deepspeed_to_pt.py zero_to_fp32.py compute_wer.py
    whisper_tn.py
"""


def code_spans(page):
    """What stands in backticks, outside the blocks of commands."""
    prose = "\n".join(line for line in page.read_text().splitlines() if not line.startswith("    "))
    return re.findall(r"`([^`\n]+)`", prose)


def first_cells(page):
    """Code spans in the first column of the page's tables."""
    rows = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| ")]
    return {span for cell in rows for span in re.findall(r"`([^`]+)`", cell)}


def commands(page, program):
    """The commands of a program in the page's indented blocks, as lists of words."""
    lines = page.read_text().replace("\\\n", " ").splitlines()
    indented = [line.strip() for line in lines if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in indented if line.startswith(f"{program} ")]


def every_command(program):
    """(page, words) of all pages, as parameters of a test."""
    found = [(page, words) for page in PAGES for words in commands(page, program)]
    names = [f"{page.stem}: {' '.join(words[: len(program.split()) + 1])}" for page, words in found]
    return pytest.mark.parametrize(("page", "words"), found, ids=names)


def given_options(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def test_every_option_and_script_of_slam_llm_has_its_place():
    named = first_cells(SLAM_LLM)
    assert not set(OPTIONS_OF_SLAM_LLM.split()) - named
    assert not set(SCRIPTS_OF_SLAM_LLM.split()) - named


def test_a_key_is_told_from_a_file_and_from_an_option_of_slam_llm():
    assert A_KEY.fullmatch("training.zero_stage: 3")[1] == "training.zero_stage"
    assert A_KEY.fullmatch("--llm.lora.rnak")[1] not in recipe_keys()
    assert A_FILE.fullmatch("projector.safetensors") and not A_KEY.fullmatch("train_config.lr")
    assert len(commands(SLAM_LLM, "slam-asr")) > 8 and len(code_spans(SLAM_LLM)) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_key_that_a_page_names_exists(page):
    named = {
        match[1]
        for span in code_spans(page)
        if (match := A_KEY.fullmatch(span)) and not A_FILE.fullmatch(span)
    }
    assert not named - set(recipe_keys())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_that_a_page_names_ships(page):
    named = {span for span in code_spans(page) if A_RECIPE.fullmatch(span)}
    assert not named - shipped_recipes().keys()


@every_command("slam-asr")
def test_every_command_of_a_stage_has_real_options_and_all_that_it_needs(page, words):
    command, arguments = command_of(words[1], words[2:])
    assert command in COMMANDS
    words = spelt_out(arguments)
    module, name = COMMANDS[command].split(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    allowed = {f"--{parameter}" for parameter in parameters} | {"--help"}
    if "recipe" in parameters:
        allowed |= {f"--{key}" for key in recipe_keys()}
    given = {option.removesuffix("+") for option in given_options(words)}  # a list's, one by one
    assert not given - allowed
    needed = {f"--{n}" for n, p in parameters.items() if p.default is p.empty}
    # A model remembers its recipe.
    assert not needed - given - ({"--recipe"} if "--model" in given else set())
    _require_recipe(words[words.index("--recipe") + 1] if "--recipe" in words else None)


@every_command("python -m pipelines")
def test_every_command_of_the_pipelines_has_real_options(page, words):
    from pipelines.cli import USAGE

    command = words[3]
    assert f"pipelines {command}" in USAGE
    if command == "run":
        _require_recipe(words[4])
        assert not set(given_options(words)) - PIPELINE_OPTIONS - {f"--{key}" for key in recipe_keys()}
    else:
        assert not [
            o for o in given_options(words) if o not in USAGE and o.removeprefix("--") not in recipe_keys()
        ]


def _require_recipe(name):
    assert name is None or name.endswith(".yaml") or name in shipped_recipes()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_or_heading(page):
    text = page.read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        assert not file or (page.parent / file).exists(), link
        assert file or heading in headings, link


def test_the_readme_leads_to_the_page_for_users_of_slam_llm():
    assert "(docs/from-slam-llm.md)" in (ROOT / "README.md").read_text()
