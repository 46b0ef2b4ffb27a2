"""`python -m mergelab`."""

from mergelab.main import main

if __name__ == "__main__":
    main()
