"""Benchmark a refit: `torchrun --nproc-per-node 8 benchmark_refit.py <flags>`, or `--dry-run` without torchrun."""

import sys

from refit.errors import explain_missing

if __name__ == "__main__":
    try:
        from refit.cli.main import main

        sys.exit(main(sys.argv[1:]))
    except ModuleNotFoundError as error:
        explain_missing(error)
