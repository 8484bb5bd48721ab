"""A directory -> Model (+ adapter). Never: data, train."""
