"""`python -m jaxcae` is the command `jaxcae`."""

import sys

from jaxcae.cli import main

if __name__ == "__main__":
    sys.exit(main())
