"""The HTTP server that transcribes recordings with OpenAI's interface."""
