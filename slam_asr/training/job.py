"""The job that `slam-asr train` hands to its training processes, as a JSON file."""

from dataclasses import dataclass, field
from typing import Any

FACTS = "training.json"
"""File in which a finished training leaves the facts for its report."""


@dataclass
class TrainingJob:
    """A training run whose inputs have been checked."""

    recipe: str
    """Resolved recipe, as YAML."""
    train_manifest: str
    dev_manifest: str | None
    """None if the training has no validation."""
    feature_store: str | None
    """None if audio is encoded on the fly."""
    llm_folder: str
    encoder_parameters: int
    """Number of the encoder's parameters, for the report."""
    folder: str
    """Local folder for results."""
    published: str
    """The stage's output folder, perhaps in object storage.

    Checkpoints are written there during the training, the other results at its end.
    """
    rows: dict[str, str | None] = field(default_factory=dict)
    """For each set (`train`, `dev`) the file with the rows that fit the encoder; None if all do."""
    init_from: str | None = None
    """Local folder of the model whose projector the training starts from."""
    init_adapter: bool = False
    """Whether the training also starts from that model's adapter."""
    ctc_tokens: list[int] = field(default_factory=list)
    """Token ids that CTC distinguishes, the blank's first; empty if the training has no CTC loss."""
    ctc_sharpness: float | None = None
    """Sharpness that the initial model's CTC head had; None if it had no head."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Everything that the trained weights depend on."""
