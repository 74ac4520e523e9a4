"""Prompts in: what a file is, whether it can be used, every problem by line; then the stream for training.

It knows files, JSON, Parquet and a tokenizer; it knows neither Ray nor an engine, and prints nothing.
"""
