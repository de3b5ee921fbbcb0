"""Settings that are read from the environment when flatstep is imported."""

import os


def check_environment() -> None:
    """Raises ValueError when FLATSTEP_NUM_THREADS is set to something that is no thread count."""
    text = os.environ.get("FLATSTEP_NUM_THREADS")
    if not text:
        return
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise ValueError(
            f"FLATSTEP_NUM_THREADS should be a whole number from 1 to 1024, {text!r} was found in "
            "the environment"
        )
