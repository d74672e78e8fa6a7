"""Without a GPU Triton's kernels run in its interpreter, which must be chosen before anything imports Triton."""

import os
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _products_do_not_hang_on_places() -> None:
    """In numpy's float32 products, on some processors, the bits of a row hang on where in the matrix it stands, as they
    do not on a GPU's tile. Summed in float64 and rounded once they do not either."""
    try:
        import numpy as np
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    real = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
            return real(self, a, b, d, *rest)
        with np.errstate(all="ignore"):  # as in float32, where nobody warns of infinities
            product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


if not torch.cuda.is_available():
    _products_do_not_hang_on_places()
