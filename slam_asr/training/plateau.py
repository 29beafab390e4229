"""Detects the plateau on which SLAM-ASR trainings often stay for a long time, so that the log can explain it.

First the loss falls, and the accuracy rises to what the LLM can guess without the audio. Both then hardly
change for hundreds or thousands of steps. Only when the projector's outputs begin to resemble token
embeddings do both improve, and suddenly.
"""

import math

SMOOTHING = 100
"""Approximate number of steps over which the accuracy is averaged."""
RISE = 0.02
"""Smallest increase of the accuracy that counts as progress."""
PATIENCE = 1000
"""Number of steps without progress after which a plateau is reported."""
SOLVED = 0.6
"""Accuracy above which the LLM is no longer guessing."""


class Plateau:
    """Follows the accuracy of a training, step by step."""

    def __init__(self) -> None:
        self.mean, self.weight = 0.0, 0.0
        self.best, self.since = 0.0, 0
        self.reported = 0
        """Length of the plateau, in steps, when it was last reported."""

    def update(self, step: int, accuracy: float) -> str | None:
        """Add a step.

        Args:
            step: number of the step, from 1.
            accuracy: share of the target tokens to which the model gives the highest probability.

        Returns:
            A line for the log when a plateau is detected, and again each time its length has doubled.
        """
        if not math.isfinite(accuracy):
            return None
        share = 1 / SMOOTHING
        # An exponential moving average, divided by `weight` to correct its bias towards the initial zero.
        self.mean += share * (accuracy - self.mean)
        self.weight += share * (1 - self.weight)
        smooth = self.mean / self.weight
        # The first steps cannot count as a plateau: their average is still too noisy.
        if smooth > self.best + RISE or step <= SMOOTHING:
            self.best, self.since, self.reported = max(smooth, self.best), step, 0
            return None
        length = step - self.since
        if smooth >= SOLVED or length < max(PATIENCE, 2 * self.reported):
            return None
        self.reported, self.best = length, max(self.best, smooth)
        return (
            f"plateau: the accuracy has been about {smooth:.2f} for {length:,} steps, as if the LLM guessed "
            "without the audio. A plateau often ends suddenly, and sooner with a better encoder "
            "(WavLM-large, HuBERT) and a chat LLM. If it does not, try more data, a longer warm-up or "
            "another learning rate, encoder.frames: speech with Whisper, or transcripts in lower case; see "
            "docs/how-to/troubleshooting.md."
        )
