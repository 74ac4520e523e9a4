"""Learners: one DeepSpeed ZeRO rank each; log-probabilities, updates, checkpoints."""
