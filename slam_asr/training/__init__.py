"""Training the projector between a frozen encoder and a frozen LLM."""
