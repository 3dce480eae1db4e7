"""`python -m dinoexport` is the `dinoexport` command."""

from dinoexport.cli import main

if __name__ == "__main__":
    main()
