"""What serving costs: lower bounds of a decode step, of prefill, and of a cycle of rollouts, refit and training.

docs/search.md has the formulas.
"""
