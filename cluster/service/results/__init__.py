"""What a run wrote, as the page reads it: metrics, samples, downloads."""
