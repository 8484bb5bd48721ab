"""The model classes that live elsewhere as remote code only. Never: adapters, data, training."""
