"""Worker processes for what needs a model or reads a file that a stranger sent."""
