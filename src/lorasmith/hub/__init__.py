"""Names -> directories; the only room that opens the network. Never: torch, families."""
