"""The tasks that a model can be trained for. Knows their names alone."""

from typing import Literal

Task = Literal["causal_lm", "classification", "seq2seq"]
"""causal_lm: the next token. classification: one of a set of labels for a whole text. seq2seq: a text from
another, by an encoder and a decoder."""
IGNORED = -100
"""The label of what is not learned, which torch's cross entropy and transformers leave out."""
