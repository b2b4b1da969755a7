"""`python -m refit.cli`: what benchmark_refit.py runs, for launchers that start a module."""

import sys

from refit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
