"""The command `outsize`, which `python -m outsize` is, too."""

from outsize.machine.environment import begin_again


def main() -> None:
    begin_again()
    from outsize.cli import main as run  # only now, so that it is imported but once

    run()


if __name__ == "__main__":
    main()
