"""Make the mark unreadable."""
