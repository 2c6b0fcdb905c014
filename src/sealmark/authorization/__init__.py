"""May this person use it? One file, one lock."""
