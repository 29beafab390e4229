"""The demo's speech, and the scripts that make speech and fetch models, if necessary without the hub."""
