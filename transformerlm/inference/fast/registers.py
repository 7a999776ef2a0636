"""How many numbers the compiled loops take at a time, on the processor that runs them.

Where llvmlite is not installed, importing this module fails.

Part of: compiled_step, instructions, step_kernels
"""

from __future__ import annotations

from llvmlite.binding import get_host_cpu_features  # type: ignore[import-untyped]

LINE = 16
"""So many numbers come from memory together: 64 bytes."""
TOGETHER = 16
"""So many keys lie together, one feature after the other."""
# Four rows' sums take half of the registers: 32 of 16 numbers with AVX-512, else at least 16 of 8 or 32 of 4.
LANES, VECTORS = (16, 4) if get_host_cpu_features().get("avx512f") else (8, 2)
