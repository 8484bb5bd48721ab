"""Model and batches -> numbers. Never: training."""
