"""`python -m gemma_nb`: the same as the `gemma-nb` command."""

import sys

from gemma_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
