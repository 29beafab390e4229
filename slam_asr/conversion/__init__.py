"""From what a training wrote to a model that decodes."""
