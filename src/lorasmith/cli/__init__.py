"""argv -> one call of the API. One file per verb, imported on demand."""
