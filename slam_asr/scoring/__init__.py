"""Scores of hypotheses against references: word error rates, and the report that shows them."""
