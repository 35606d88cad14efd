"""Kernels for NVIDIA Hopper, written in Gluon: asynchronous copies, warp specialisation and wgmma, laid out by hand.

Each has a portable counterpart in plain Triton in :mod:`fp8kv.kernels`, whose launcher chooses between the two.
"""
