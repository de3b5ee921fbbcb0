"""How a step is measured: beside its peers and the memory's own speed, by parts, in instructions.

``python -m flatstep bench`` needs nothing but the wheel and MLX; torch joins in where it is
installed. ``python -m flatstep.benchmark.profile`` divides a step's time, and
``python -m flatstep.benchmark.instructions``, in a checkout, counts its instructions.
"""
