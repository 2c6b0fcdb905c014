"""Several users against their marks."""
