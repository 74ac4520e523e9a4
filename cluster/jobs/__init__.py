"""Runs as Ray jobs: submitting, stopping, and what became of their processes."""
