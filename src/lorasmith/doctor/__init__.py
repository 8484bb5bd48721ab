"""Machine, libraries, model directory -> Checks, each with its remedy. Never: training rows."""
