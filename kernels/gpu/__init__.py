"""The Triton kernels, a module for each op: imported by the op's launcher on first use, and by nothing else.

The launchers check, these trust. Each file holds kernels and the plain functions that launch them. Annotations are not
put off (`from __future__ import annotations`): Triton reads `tl.constexpr` from them.
"""

from typing import Any, Final

OPTIONS: Final[dict[str, Any]] = {"enable_fp_fusion": True}
"""Of every launch: a * b + c is one instruction. Triton's own default, but for how long is open (3.9 warns of it)."""
