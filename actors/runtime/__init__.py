"""Ray, applied in one place: actors with deadlines and named causes, placement, sharing of GPUs."""
