"""Model folders: what they hold, where they are, fetching, trying and exporting them."""
