"""Tensors -> tensors. Never: a config, a family, a model class."""
