"""A data source -> checked, encoded examples. Never: torch, families, model."""
