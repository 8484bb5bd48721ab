"""Text <-> ids, special tokens by id alone. Never: conversations, families, torch."""
