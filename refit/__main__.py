"""`python -m refit`: the console command."""

import sys

from refit.errors import explain_missing

if __name__ == "__main__":
    try:
        from refit.commands import main

        sys.exit(main(sys.argv[1:]))
    except ModuleNotFoundError as error:
        explain_missing(error)
