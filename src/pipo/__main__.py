"""`python -m pipo` is the `pipo` command."""

from pipo.cli import main

if __name__ == "__main__":
    main()
