"""`python -m fastidmm`: the same as the command `fastidmm`."""

from fastidmm.cli import main

if __name__ == "__main__":
    main()
