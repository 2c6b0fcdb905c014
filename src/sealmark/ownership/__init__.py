"""Is this suspect mine? One file, one scheme."""
