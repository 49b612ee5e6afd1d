"""The command `fastidmm`, also as `python -m fastidmm`."""

import os
import sys

from fastidmm.interrupt import heed


def main() -> None:
    """Heed signals before anything is loaded, then run the command."""
    heed()
    # One that is closed (`2>&-`) would lend its number, and all that is told, to a file of the run.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    from fastidmm.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
