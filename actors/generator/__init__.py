"""Generators: vLLM writes completions, and receives the weights that the learners publish."""
