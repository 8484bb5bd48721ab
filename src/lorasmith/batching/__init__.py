"""Examples -> flat rows, by the number of their step. Never: records, chat formats, torch."""
