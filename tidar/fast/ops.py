"""The kernels of a step, or their plain twins where there is no GPU; the same names and arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__all__ = ["load"]


def load(*, plain: bool) -> Any:
    """A namespace with ``embed``, ``norm_linear``, ``norm_gated``, ``linear_add``, ``linear_add_norm``, ``norm``,
    ``rotate``, ``attend``, ``rotate_attend``, ``sample``, ``accept``, ``draft``, ``chain``, and ``shortlists``, the
    memory of the last.

    Args:
        plain: the twins, which read device values on the host; else Triton's kernels, which a CUDA graph can capture.
    """
    names: dict[str, Any] = {}
    if plain:
        from tidar.fast import plain_sample
        from tidar.kernels import reference, reference_chain, reference_products, reference_step

        for module in (reference, reference_chain, reference_products, plain_sample, reference_step):
            names |= {name: getattr(module, name) for name in module.__all__}
        names["shortlists"] = reference_chain.PlainLists.of
    else:
        from tidar.kernels import accept, chain, draft, products, residual, rotate, rowwise, sample, step_attention
        from tidar.kernels.shortlists import Shortlists

        for module in (accept, chain, draft, products, residual, rotate, rowwise, sample, step_attention):
            names |= {name: getattr(module, name) for name in module.__all__}
        names["shortlists"] = Shortlists.for_step
    return SimpleNamespace(**names)
