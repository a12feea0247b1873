"""`python -m intact` is the command line."""

from intact.cli import main

if __name__ == "__main__":
    main()
