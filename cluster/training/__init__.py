"""A run: the driver loop, its rollouts and steps, and the start and end of all roles."""
