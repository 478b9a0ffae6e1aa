"""How fast this machine reads memory right now: the limit that decoding is held against.

The one idea: it is taken again beside every measurement, over memory far larger than the caches and with as many
threads as the engines have, so that a busy machine lowers both figures.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from fastgpt_jax.errors import UserError

SOURCE = Path(__file__).with_suffix(".c")
NUM_BYTES = 512 * 2**20


class Bandwidth:
    """A compiled reader with memory that is resident."""

    def __init__(self, num_threads: int):
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "bandwidth.so")
            command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(library)]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise UserError(f"the memory bandwidth is measured by a C program, which needs cc: {error}") from None
            self._library = ctypes.CDLL(str(library))
        self._library.read_bandwidth.restype = ctypes.c_double
        self._num_threads = num_threads
        self._memory = np.ones(NUM_BYTES, np.uint8)

    def measure(self) -> float:
        """Bytes a second, the best of three passes."""
        sink = ctypes.c_uint64()
        memory, count = ctypes.c_void_p(self._memory.ctypes.data), ctypes.c_uint64(NUM_BYTES)
        return max(self._library.read_bandwidth(memory, count, self._num_threads, ctypes.byref(sink)) for _ in range(3))
