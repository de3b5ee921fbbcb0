"""A process that measures some contenders in one setting, for `run.py`."""

from flatstep.benchmark.process import serve

from .contenders import SPINNING, group_of, make_contenders

if __name__ == "__main__":
    serve(make_contenders, lambda names: group_of(names[0]) in SPINNING)
