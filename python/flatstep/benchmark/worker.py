"""Measures flatstep or mlx.optimizers in one setting, for ``python -m flatstep bench``."""

import faulthandler

from .contenders import make_contenders
from .process import serve

if __name__ == "__main__":
    # A crash in a kernel then says at least where Python was.
    faulthandler.enable()
    serve(make_contenders, lambda names: False)
