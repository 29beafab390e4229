"""Trains the projector between encoder and LLM, and optionally the encoder, the LLM or LoRA adapters."""
