"""The Triton kernels, a module for each op: imported by the op's launcher on first use, and by nothing else.

The launchers check, these trust. Each file holds kernels and the plain functions that launch them. Annotations are not
put off (`from __future__ import annotations`): Triton reads `tl.constexpr` from them.
"""
