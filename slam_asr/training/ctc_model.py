"""The model of a training run's first phase, the beginning: the projector and a CTC head, without the LLM."""

import torch
from rapidfuzz.distance import Levenshtein
from torch import nn

from slam_asr.models.augmentation import Augmentation
from slam_asr.models.ctc import CtcBatch, CtcHead, best_paths, ctc_loss
from slam_asr.models.encoders.base import SpeechEncoder, encode_audio
from slam_asr.models.projector import SpeechProjector


class CtcModel(nn.Module):
    """A projector, and the CTC head whose loss trains it.

    Args:
        projector: the projector, which is trained.
        head: the CTC head. Only its sharpness is trained.
        encoder: needed if audio is encoded on the fly. It is frozen, and not registered as a submodule.
        feature_dtype: dtype of saved features, to which the encoder's outputs are rounded.
        augmentation: dropout and masks of the features in training; none by default.
    """

    encoder: SpeechEncoder | None

    def __init__(
        self,
        projector: SpeechProjector,
        head: CtcHead,
        encoder: SpeechEncoder | None = None,
        feature_dtype: str = "fp32",
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        self.projector, self.head = projector, head
        object.__setattr__(self, "encoder", encoder)
        self.feature_dtype, self.augment = feature_dtype, augmentation or Augmentation()

    def spell(self, batch: CtcBatch) -> list[list[int]]:
        """Return CTC's best path of each utterance.

        A path is a list of indices of `CtcVocabulary`. Repetitions are merged, and then blanks are removed.
        """
        return best_paths(self._outputs_and_logits(batch)[1], batch.positions)

    def forward(self, batch: CtcBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss of a batch, summed over its utterances.

        Each utterance adds two terms. The first is CTC's loss: the negative log-probability of its tokens.
        The second is the mean squared distance of its outputs from their expected embeddings, multiplied by
        its number of tokens and by `batch.distance_weight`. The engine divides the sum by the number of
        tokens in the step, which makes both terms means per token.

        Returns:
            The loss (scalar, float32, with a gradient), and sums ([3] float64, detached): CTC's loss, the
            number of tokens minus the token errors of the best paths, and the number of tokens.
        """
        outputs, logits = self._outputs_and_logits(batch)
        if not batch.targets:
            # Without targets, every weight still needs a gradient, of zero, for the engine's communication.
            return logits.sum() * 0.0, torch.zeros(3, dtype=torch.float64, device=logits.device)
        loss = ctc = ctc_loss(logits, batch.positions, batch.targets)
        if batch.distance_weight:
            distances = self.head.distances(outputs, logits).split(batch.positions)
            # An utterance without positions is skipped, because the mean of an empty tensor is NaN.
            means = [d.mean() * len(t) for d, t in zip(distances, batch.targets, strict=True) if len(d)]
            if means:
                loss = ctc + batch.distance_weight * torch.stack(means).sum()
        # Token errors are only counted: no gradient passes through a best path.
        paths = best_paths(logits, batch.positions)
        errors = sum(
            Levenshtein.distance(path, target.tolist())
            for path, target in zip(paths, batch.targets, strict=True)
        )
        tokens = sum(len(t) for t in batch.targets)
        counts = torch.tensor([tokens - errors, tokens], dtype=torch.float64, device=logits.device)
        return loss, torch.cat([ctc.detach().double()[None], counts])

    def _outputs_and_logits(self, batch: CtcBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the projector's outputs [positions, LLM width] and their logits [positions, 1 + tokens]."""
        features = self.augment(encode_audio(self.encoder, batch.audio, self.feature_dtype))
        outputs = self.projector(features, batch.positions)
        return outputs, self.head(outputs)
