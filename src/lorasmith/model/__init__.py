"""A directory -> Model (+ adapter). Never: data, training."""
