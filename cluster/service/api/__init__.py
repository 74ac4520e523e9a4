"""The HTTP API, a router per subject."""
