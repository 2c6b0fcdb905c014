"""Which user is this? One file, one user mark."""
