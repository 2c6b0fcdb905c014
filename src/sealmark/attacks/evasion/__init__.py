"""Leave the weights alone and change what the service answers to a verifier."""
