"""The command line, `rlhf`."""
