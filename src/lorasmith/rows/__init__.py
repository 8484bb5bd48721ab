"""A data file -> rows -> conversations, each with its place. Never: chat formats, ids, torch."""
