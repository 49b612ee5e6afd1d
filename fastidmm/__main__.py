"""The command `fastidmm`, also as `python -m fastidmm`."""

from fastidmm.interrupt import heed


def main() -> None:
    """Heed signals before anything is loaded, then run the command."""
    heed()
    from fastidmm.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
