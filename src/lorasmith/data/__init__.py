"""Records -> Conversation -> Example -> Plan -> Batch. Never: torch, families, model."""
