"""The models: a speech encoder, a trained projector, an LLM, and the model that joins them."""
