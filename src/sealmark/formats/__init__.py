"""Files that leave the process."""
