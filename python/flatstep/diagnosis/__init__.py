"""What ``python -m flatstep doctor`` looks at: the machine, the results, the memory, the speed.

It needs nothing but the wheel and MLX, so that whoever reports a bug can run it.
"""
