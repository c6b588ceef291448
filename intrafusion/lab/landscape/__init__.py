"""The loss between networks: measured, drawn, reported."""
