"""Print what the build needs, one requirement a line, for a build without pip's isolation.

The list is pyproject.toml's own. In an environment that keeps these, a second build compiles only
what has changed.
"""

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
data: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8"))
cmake = "cmake" + data["tool"]["scikit-build"]["cmake"]["version"]
print("\n".join([*data["build-system"]["requires"], cmake, "ninja>=1.11"]))
