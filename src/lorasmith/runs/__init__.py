"""A run's directory on disk: who holds it, what is in it, and how it is told. Never: torch, records."""
