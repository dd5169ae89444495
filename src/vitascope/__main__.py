"""`python -m vitascope`: the same as the command `vitascope`."""

from vitascope.cli.app import run

if __name__ == "__main__":
    run()
