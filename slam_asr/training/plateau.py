"""Naming the plateau on which trainings of this model often stay for a long time.

The loss falls and the accuracy rises to what the LLM can guess without listening; there they stay, for
hundreds or thousands of steps, until the projector finds the LLM's language and both jump.
"""

import math

SMOOTHING = 100
"""Steps over which the accuracy is averaged, about."""
RISE = 0.02
"""More than this is a rise."""
PATIENCE = 1000
"""Steps without a rise that are called a plateau."""
SOLVED = 0.6
"""An accuracy above this is no guessing any more."""


class Plateau:
    """Watches the accuracy of a training, step by step."""

    def __init__(self) -> None:
        self.mean, self.weight = 0.0, 0.0
        self.best, self.since = 0.0, 0
        self.said = 0
        """Steps of the plateau when it was last named."""

    def see(self, step: int, accuracy: float) -> str | None:
        """What is to be said of it, once at first and then each time that the plateau has doubled."""
        if not math.isfinite(accuracy):
            return None
        share = 1 / SMOOTHING
        self.mean += share * (accuracy - self.mean)
        self.weight += share * (1 - self.weight)
        smooth = self.mean / self.weight
        if smooth > self.best + RISE or step <= SMOOTHING:
            self.best, self.since, self.said = max(smooth, self.best), step, 0
            return None
        length = step - self.since
        if smooth >= SOLVED or length < max(PATIENCE, 2 * self.said):
            return None
        self.said, self.best = length, max(self.best, smooth)
        return (
            f"plateau: the accuracy has been about {smooth:.2f} for {length:,} steps, as it is where the LLM guesses without listening. It often ends "
            "all at once, sooner with a better encoder (WavLM-large, HuBERT) and a chat LLM. If it does not: more data, a longer warm-up or another "
            "learning rate, encoder.frames: speech with Whisper, transcripts in lower case; see docs/troubleshooting.md."
        )
