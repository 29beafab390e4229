"""Greedy and beam search through the LLM."""
