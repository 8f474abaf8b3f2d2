"""The toy world of `make demo`: everything it needs is drawn and trained here, then written in the real formats."""
