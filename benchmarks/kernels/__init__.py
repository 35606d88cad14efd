"""Times of the kernels on one GPU: one module per kernel of the same name, ``run`` to time them, ``table`` to show them.

The method is described in ``timing``, the data in ``problems``, and both in ``docs/kernels.md``.
"""
