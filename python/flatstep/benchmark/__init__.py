"""How a step is measured against the memory's own speed, and what an Apple GPU should need for it.

``python -m flatstep bench`` needs nothing but the wheel and MLX. The suite in ``bench/``, which
adds other libraries, measures with the same code.
"""
