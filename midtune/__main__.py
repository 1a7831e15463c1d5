"""`python -m midtune`."""

from midtune.cli import main

if __name__ == "__main__":
    main()
