"""A run's directory: config, state, metrics, samples, checkpoints."""
