"""The Triton kernels of deltas: `pack` finds and packs what has changed, `apply` applies it."""
