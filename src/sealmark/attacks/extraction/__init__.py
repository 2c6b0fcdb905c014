"""Make a model of one's own from another's answers."""
