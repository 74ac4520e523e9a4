"""What a run will do and need, before anything starts."""
