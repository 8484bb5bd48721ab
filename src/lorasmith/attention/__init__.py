"""Attention over a Layout, in all its forms. Never: a config, a family, a model class."""
