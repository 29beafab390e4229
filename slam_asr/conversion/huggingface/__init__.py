"""Source files that `convert-checkpoint --to huggingface` copies: they need only torch and transformers."""
