"""`python -m refit`: the console command."""

import sys

from refit.errors import CANCELLED, explain_missing

if __name__ == "__main__":
    try:
        from refit.commands import main_from_shell

        sys.exit(main_from_shell())
    except ModuleNotFoundError as error:
        explain_missing(error)
    except KeyboardInterrupt:  # while modules are imported
        sys.exit(CANCELLED)
