"""What several tests share: tiny models, recorded runs, stand-ins."""
