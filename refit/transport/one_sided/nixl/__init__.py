"""NIXL as a method: its agents, memory, buffers, and what carries their bytes."""
