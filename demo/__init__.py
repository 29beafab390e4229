"""The demo's speech and models; the scripts in this folder made the speech and the shipped projector."""
