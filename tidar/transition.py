"""How a draft leans on the token before it: an option beyond the paper.

One-step diffusion drafts every place of a block without knowing what the others became, and the layout drafts them
before the correction s_n is known (paper, section 3.2). So a block may start one sentence and end another. A
*transition* mends this after the forward: the drafts of a block are chosen one after another, each from the masks'
hidden state bent by the token just chosen before it. It is a gated form of the low-rank transition of
non-autoregressive translation (NART-CRF, Sun et al. 2019), as sequentially dependent draft heads are (Hydra, Ankner et
al. 2024). Verification does not change, so neither does the text; without one, drafts are the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

__all__ = ["Transition"]


class Transition(nn.Module):
    """``h + out(silu(state(norm h) + token(norm e)))``: h a mask's hidden state, e the embedding of the token before.

    Args:
        hidden_size: D, of the hidden state.
        embedding_size: of the embedding.
        width: of the gate between.
    """

    def __init__(self, hidden_size: int, embedding_size: int, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(hidden_size, width, bias=False)
        self.token = nn.Linear(embedding_size, width, bias=False)
        self.out = nn.Linear(width, hidden_size, bias=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Weights that change no draft yet, drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        for part in (self.state, self.token):
            drawn = torch.randn(part.weight.shape, generator=generator) * part.in_features**-0.5
            part.weight.copy_(drawn)
        self.out.weight.zero_()

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """(…, D) from hidden states (…, D) and embeddings (…, E) of the tokens before."""
        gate = silu(self.state(rms_norm(hidden, hidden.shape[-1:])) + self.token(rms_norm(before, before.shape[-1:])))
        bent: Tensor = hidden + self.out(gate).to(hidden.dtype)
        return bent
