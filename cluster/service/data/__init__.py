"""Prompts files that were uploaded or named: reports, rows, lengths."""
