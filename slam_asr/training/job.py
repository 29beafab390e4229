"""The job that `slam-asr train` passes to its training processes as a JSON file."""

from dataclasses import dataclass, field
from typing import Any

FACTS = "training.json"
"""Name of the file to which a finished training run writes the facts for its report."""


@dataclass
class TrainingJob:
    """A training run whose inputs have been checked."""

    recipe: str
    """The complete recipe as YAML, with all overrides applied."""
    train_manifest: str
    dev_manifest: str | None
    """None if the training run has no validation."""
    feature_store: str | None
    """None if audio is encoded on the fly."""
    llm_folder: str
    encoder_parameters: int = 0
    """Number of the encoder's parameters, for the report."""
    folder: str = ""
    """Local folder for results."""
    published: str = ""
    """The stage's output folder, perhaps in object storage.

    During the training, checkpoints are written there. If the folder is in object storage, the recipe is
    uploaded before the training, and the page with the curves, its data and TensorBoard's files are updated
    there during the training. All other results follow at the end.
    """
    rows: dict[str, str | None] = field(default_factory=dict)
    """For each set (`train`, `dev`), the file with the indices, from 0, of the manifest's utterances that fit
    the encoder's window; None if all fit."""
    init_from: str | None = None
    """Local folder of the model whose projector the training starts from."""
    ctc_tokens: list[int] = field(default_factory=list)
    """Token ids that CTC distinguishes, the blank's first; empty if the training has no CTC loss."""
    ctc_sharpness: float | None = None
    """Sharpness of the initial model's CTC head; None without such a head."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Everything that changes the trained weights by more than rounding errors. It has the key `init_adapter`
    if the training also starts from the adapter of the model in `init_from`."""
