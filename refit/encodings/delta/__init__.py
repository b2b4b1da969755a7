"""Deltas: of the weights that a destination has already, only those that have changed are sent."""
