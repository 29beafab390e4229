"""Messages to a webhook when a run ends, and the reasons for its failure that they report."""
