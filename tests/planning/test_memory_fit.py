"""A training run that cannot fit in memory is refused before anything is loaded.

A run that might not fit gets a warning.
"""

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from slam_asr.artifacts.manifest import Utterance
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.models.encoders.registry import spec_of
from slam_asr.models.prompt import TokenizedPrompt
from slam_asr.planning.memory import PROCESS_OVERHEAD, training_memory
from slam_asr.planning.memory_fit import loads_of, require_fit
from slam_asr.planning.shapes import Shapes
from slam_asr.runtime import machine
from slam_asr.runtime.machine import Machine, host_memory


class Words:
    """A prompt of 12 tokens. An answer has one token for each word, and one for its end."""

    for_training = (TokenizedPrompt("say", [], [1] * 12),)

    def with_answer(self, prompt: TokenizedPrompt, answer: str) -> tuple[list[int], list[int]]:
        return [1] * 12, [2] * (len(answer.split()) + 1)


def shapes(**training) -> Shapes:
    options = {
        "positions_per_step": 6000,
        "positions_per_batch": min(6000, training.get("positions_per_step", 6000)),
        **training,
    }
    recipe = load_recipe(
        "librispeech",
        {
            "encoder.frames": "speech",
            "encoder.long_audio": "split",
            **{f"training.{key}": value for key, value in options.items()},
        },
    )
    encoder = spec_of(
        Path("none"),
        AutoConfig.for_model("whisper", d_model=64, encoder_layers=1, decoder_layers=1),
        recipe.encoder,
    )
    llm = AutoConfig.for_model(
        "llama",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=32000,
    )
    return Shapes(recipe, encoder, llm, [])


def utterances(count: int = 400, longest: float = 10.0) -> list[Utterance]:
    """Utterances of five seconds each, except for one in the middle."""
    return [
        Utterance(str(i), "a.wav", "a few words", duration=longest if i == count // 2 else 5.0)
        for i in range(count)
    ]


def predicted_memory(of: Shapes, processes: int = 1, on_gpu: bool = True) -> float:
    return training_memory(of, loads_of(of, Words(), utterances(), processes)[1], processes, on_gpu).total


def gpus(memory: float | None, count: int = 1, host: float | None = None) -> Machine:
    return Machine(count, count, True, memory, host)


def test_a_run_that_cannot_fit_is_refused_and_one_that_might_not_gets_a_warning(capsys):
    model = shapes()
    with pytest.raises(
        UserError,
        match=r"needs about 5\.\d+ GB of each GPU \(3\.\d+ GB activations and 1\.5 GB CUDA and NCCL\), "
        r"and a GPU has 4\.\d+ GB: ",
    ) as refused:
        require_fit(model, Words(), utterances(), gpus(predicted_memory(model) / 1.16))
    assert "\n" not in refused.value.args[0]
    assert capsys.readouterr().out == ""
    require_fit(model, Words(), utterances(), gpus(predicted_memory(model) / 1.14))
    assert capsys.readouterr().out.startswith("warning: This training run needs about")
    require_fit(model, Words(), utterances(), gpus(predicted_memory(model) / 0.9))
    assert capsys.readouterr().out == ""


def test_the_proposed_options_fit(capsys):
    model = shapes()
    capacity = predicted_memory(model) / 1.16
    with pytest.raises(UserError) as refused:
        require_fit(model, Words(), utterances(), gpus(capacity))
    proposed = dict(re.findall(r"--training\.(\w+) (\S+?)(?=[ .]|$)", str(refused.value)))
    assert proposed.keys() == {"positions_per_batch"}
    require_fit(
        shapes(positions_per_batch=int(proposed["positions_per_batch"])),
        Words(),
        utterances(),
        gpus(capacity),
    )
    assert capsys.readouterr().out == ""


def test_if_no_option_helps_the_error_suggests_hardware():
    with pytest.raises(UserError, match="use more or larger GPUs, or a smaller LLM"):
        require_fit(shapes(), Words(), utterances(), gpus(1e9))


def test_processes_on_a_cpu_share_the_host(capsys):
    model = shapes()
    one, two = (predicted_memory(model, n, on_gpu=False) for n in (1, 2))
    require_fit(model, Words(), utterances(), Machine(1, 1, False, one * 1.1, one * 1.1))
    assert capsys.readouterr().out == ""
    with pytest.raises(
        UserError,
        match=r"in each of 2 processes \(.+, fewer training.processes|"
        r"in each of 2 processes .+ set --training",
    ):
        require_fit(model, Words(), utterances(), Machine(2, 2, False, two, two))


def test_the_longest_utterance_determines_the_memory(capsys):
    model = shapes(positions_per_batch=100)
    one, load = loads_of(model, Words(), utterances(longest=25.0), 1)
    assert one.audio == 250 and one.length == 250 + 12 + 4 and load == one
    capacity = gpus(predicted_memory(model) * 1.1)
    require_fit(model, Words(), utterances(), capacity)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError):
        require_fit(model, Words(), utterances(longest=2000.0), capacity)


def test_a_batch_is_limited_by_the_budget_the_step_and_the_number_of_utterances():
    def positions(count: int = 400, processes: int = 1, **training) -> float:
        _, load = loads_of(shapes(**training), Words(), utterances(count), processes)
        return load.rows * load.length

    assert positions(positions_per_batch=600) == pytest.approx(600)
    assert (
        positions(positions_per_batch=600, packing=False) == 5 * 116
    )  # complete utterances, as long as the longest
    assert positions(positions_per_step=2000, positions_per_batch=2000, processes=4) == pytest.approx(500)
    assert positions(count=4) == pytest.approx(4 * 66 + 50)
    assert positions(utterances_per_batch=3) == 3 * 116


def test_with_unknown_memory_or_model_nothing_is_checked(capsys, monkeypatch):
    model = shapes()
    require_fit(model, Words(), utterances(), gpus(None))
    monkeypatch.setattr(Shapes, "saved_bytes", lambda self, rows, length: 1 / 0)
    require_fit(model, Words(), utterances(), gpus(1.0))
    assert capsys.readouterr().out == ""


def test_an_offloaded_optimiser_must_fit_into_host_memory():
    full = shapes(zero_stage=2, offload_optimizer=True)
    full = dataclasses.replace(
        full,
        recipe=dataclasses.replace(full.recipe, llm=dataclasses.replace(full.recipe.llm, tuning="full")),
        _cache={},
    )
    need = 12 * full.trained_parameters + PROCESS_OVERHEAD
    require_fit(full, Words(), utterances(), gpus(80e9, host=need))
    with pytest.raises(UserError, match=r"training\.offload_optimizer needs about .+ of memory on this host"):
        require_fit(full, Words(), utterances(), gpus(80e9, host=need / 1.2))


def test_a_containers_limit_takes_precedence_over_the_hosts_memory(tmp_path, monkeypatch):
    limits = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", [str(path) for path in limits])
    assert host_memory() > 1e8
    limits[0].write_text("max\n")
    assert host_memory() > 1e8
    limits[1].write_text("50000000\n")
    assert host_memory() == 5e7


@pytest.mark.parametrize(
    ("name", "statistics", "left"),
    [
        ("memory.max", "anon 475000000\nfile 9000000000\nshmem 25000000\nanon_thp 7\n", 4e8),
        ("memory.limit_in_bytes", "cache 9000000000\nrss 1\ntotal_rss 475000000\nshmem 25000000\n", 4e8),
        ("memory.max", "anon 950000000\n", 0.0),
    ],
)
def test_memory_that_a_containers_processes_already_take_is_not_available(
    tmp_path, monkeypatch, name, statistics, left
):
    monkeypatch.setattr(machine, "CGROUP_LIMITS", [str(tmp_path / name)])
    (tmp_path / name).write_text("900000000\n")
    (tmp_path / "memory.stat").write_text(statistics)
    assert host_memory() == left


def test_the_memory_of_python_is_counted_for_each_process(capsys):
    model = shapes(positions_per_batch=100)
    predicted = training_memory(model, loads_of(model, Words(), utterances(), 1)[1], 1, on_gpu=False)
    fitting, fitting_without_python = predicted.total, (predicted.total - predicted.overhead) / 0.9
    require_fit(model, Words(), utterances(), Machine(1, 1, False, fitting / 0.9, fitting / 0.9))
    assert capsys.readouterr().out == ""
    require_fit(model, Words(), utterances(), Machine(1, 1, False, fitting, fitting))
    assert "warning: This training run needs about" in capsys.readouterr().out
    with pytest.raises(UserError, match="Python and its libraries"):
        machine = Machine(1, 1, False, fitting_without_python, fitting_without_python)
        require_fit(model, Words(), utterances(), machine)
    with pytest.raises(
        UserError, match=r"^4 training processes need about 2 GB of memory on this host, which has 1\.5 GB"
    ):
        require_fit(shapes(), Words(), utterances(), gpus(80e9, count=4, host=1.5e9))
