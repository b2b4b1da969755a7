"""Benchmark a refit: `torchrun --nproc-per-node 8 benchmark_refit.py <flags>`, or `--dry-run` without torchrun."""

import sys

from refit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
