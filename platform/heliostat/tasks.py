"""The tasks that a model can be trained for. Knows their names alone."""

from typing import Literal

Task = Literal["causal_lm", "classification"]
"""causal_lm: the next token. classification: one of a set of labels for a whole text."""
