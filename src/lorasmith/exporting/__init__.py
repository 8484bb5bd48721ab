"""Model (+ adapter) -> files for elsewhere. In: directories. Out: directories. Never: data, training."""
