"""Messages <-> token ids. In: Message. Out: Pieces, then ids and labels. Never: torch, families, data."""
