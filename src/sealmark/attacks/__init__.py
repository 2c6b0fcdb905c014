"""What a thief does. One file, one attack."""
