"""Maths on tensors: the reference of each op, and its kernels.

This folder shares its name with a Hugging Face package that other libraries look for. Keep this module empty of
imports and of a `__version__`, by which those libraries recognise the package.
"""
