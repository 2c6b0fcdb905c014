"""Was it changed? One file, one seal."""
