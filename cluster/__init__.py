"""Who coordinates: config, driver loop, checkpoints, command line; it knows the roles' protocols, never an engine."""
