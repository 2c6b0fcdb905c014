"""Claim what is somebody else's."""
