"""Heliostat: fine-tune, tune, register and serve GPT-style language models on Ray. Imports nothing heavy."""

__version__ = "0.1.0"
