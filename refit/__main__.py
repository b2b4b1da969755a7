"""`python -m refit`: the console command."""

import sys

from refit.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
