"""Run the command line as ``python -m polyak_cli``."""

from polyak_cli.cli import main

if __name__ == "__main__":
    main()
