"""What a family is: one torch-free file each. In: config.json. Out: Family. Never: torch, data, model."""
