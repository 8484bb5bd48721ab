"""Messages -> text. Never: training, data."""
