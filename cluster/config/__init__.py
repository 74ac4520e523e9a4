"""The config of a run: its schema, its checks, its warnings, and the tree that YAML, command line and page share."""
