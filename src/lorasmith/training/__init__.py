"""Batches -> an adapter on disk. Never: records, chat formats, inference."""
