"""The check that the MLX found is the one that the extension was built for.

MLX's C++ ABI changes between releases, so any other version would crash or refuse every array.
"""

import sys
from importlib import metadata

REQUIRED_MLX = "0.32.4"


def check_mlx_version() -> None:
    """Raises ImportError, saying what was found, what is needed and how to mend it."""
    try:
        found = metadata.version("mlx")
    except metadata.PackageNotFoundError:
        found = "none"
    if found != REQUIRED_MLX:
        wanted = "mlx[cpu]" if sys.platform == "linux" else "mlx"
        raise ImportError(
            f"flatstep needs mlx {REQUIRED_MLX}, for which its extension was compiled, but found "
            f"{'no mlx' if found == 'none' else 'mlx ' + found}. Mend it with: "
            f'pip install "{wanted}=={REQUIRED_MLX}", or install the flatstep release made for '
            "your version of mlx."
        )
