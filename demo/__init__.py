"""The demo's speech and models, and the scripts that make speech and fetch models without the hub."""
