"""Kernels: tensors in, tensors out. Nothing here knows ranks, layers or requests.

ref.py       the torch twin of every op: its specification, and the CPU path
ops.py       Ops, the typed set of ops that a model calls; backend.py chooses each op's library
*_ops.py     calls into vendor libraries (deep_gemm, flash_mla, flash_attn)
the others   our kernels in Triton and Gluon, and their shared parts (fp8_format.py, gemm.py, hopper.py, pdl.py, ...)

May import torch and, inside this folder alone, Triton and the vendor libraries. Imports no other folder.
"""
