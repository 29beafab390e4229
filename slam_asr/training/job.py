"""What `slam-asr train` hands to the processes that do the work."""

from dataclasses import dataclass, field
from typing import Any

FACTS = "training.json"
"""What the report says about a training that has ended."""
CHECKPOINTS = "checkpoints"


@dataclass
class TrainingJob:
    """A training, checked and written down."""

    recipe: str
    """Resolved, as YAML."""
    train_manifest: str
    dev_manifest: str | None
    feature_store: str | None
    """None where audio is encoded on the way."""
    llm_folder: str
    encoder_parameters: int
    folder: str
    """Where results go on this machine."""
    published: str
    """The stage's own folder, perhaps in object storage, where checkpoints go at once and results in the end."""
    init_from: str | None = None
    """Local folder of the model whose projector it begins with."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """All that the weights depend on."""
