"""What goes wrong: before a kernel runs, and while it does."""


class CompileError(Exception):
    """The source is not MSL, or not what this project allows; the message has file and line."""


class KernelError(Exception):
    """A dispatch was wrong, or a kernel did what it must not."""
