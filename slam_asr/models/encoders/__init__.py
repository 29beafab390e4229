"""Speech encoders: Whisper, WavLM, HuBERT and wav2vec 2.0."""
