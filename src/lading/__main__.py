"""`python -m lading`: the command `lading`."""

from lading.cli import main

if __name__ == "__main__":
    main()
