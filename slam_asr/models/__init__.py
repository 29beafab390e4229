"""The models: a frozen speech encoder, a trained projector, a frozen LLM, what joins them, and where weights come from."""
