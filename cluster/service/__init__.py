"""The HTTP service and its page; it imports no torch: what needs a model runs in a helper process or on the cluster."""
