"""What may be done to a network's hidden units for free, and how it is undone: structure, rewriting, alignment."""
