"""What lies in directories that may come from anywhere: named and checked. Never: torch."""
