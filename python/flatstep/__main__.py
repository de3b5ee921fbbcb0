"""``python -m flatstep``: commands for whoever has installed the package."""

import argparse
import faulthandler
import os
import sys

from . import __version__


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    # Only here, so that importing flatstep costs what training needs.
    from . import bench, doctor, memory

    parser = argparse.ArgumentParser(prog="python -m flatstep", description="flatstep's commands.")
    parser.add_argument("--version", action="version", version=f"flatstep {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor.add_command(commands)
    bench.add_command(commands)
    memory.add_command(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    # A crash in a kernel then says at least where Python was.
    faulthandler.enable()
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        print(f"python -m flatstep: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)
