"""Messages to a webhook when a run ends, and explanations of why a step failed or waits."""
