"""Transcription of any audio: long recordings are divided at pauses, and transcripts come with their times.

`load_transcriber` is the entry for Python programs. Importing this package does not import torch.
"""

from slam_asr.transcribing.formats import Segment, Transcript
from slam_asr.transcribing.transcriber import Transcriber, load_transcriber

__all__ = ["Segment", "Transcriber", "Transcript", "load_transcriber"]
