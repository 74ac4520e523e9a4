"""Models as the learners hold them: causal language models, adapters, 4-bit weights, merging, export."""
