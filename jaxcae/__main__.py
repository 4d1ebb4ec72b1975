"""`python -m jaxcae` is the command `jaxcae`."""

from jaxcae.cli import entry

if __name__ == "__main__":
    entry()
