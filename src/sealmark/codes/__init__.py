"""Codes that resist collusion, and codes that correct errors."""
