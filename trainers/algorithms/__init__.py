"""The algorithms, one file each; a new one is a file, a config class and a line in `catalog.ALGORITHMS`."""
