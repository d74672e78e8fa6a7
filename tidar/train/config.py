"""What a training run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tidar.config import Architecture
from tidar.data.config import DataConfig
from tidar.errors import TidarError

__all__ = ["Cluster", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs of a run that is planned."""

    gpus: int = 1
    """How many share the run."""
    gpu_gib: float = 80.0
    """Memory of one, in GiB."""
    tflops: float = 790.0
    """Its bf16 matrix products a second, in units of 10^12 operations; as measured on one NVIDIA H200."""
    mfu: float | None = None
    """Share of `tflops` that training reaches; by default as measured for the nearest widths."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpu_gib <= 0 or self.tflops <= 0:
            raise TidarError("gpus, gpu_gib and tflops must be above 0")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise TidarError(f"mfu must lie in (0, 1], not {self.mfu}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; a recipe (`tidar.recipes`) is a named one."""

    out: str = "run"
    """Folder for checkpoints, metrics and the final model."""

    model: str = ""
    """Checkpoint to start from, folder or hub id; it is given a mask token if it has none. Empty: fresh weights of
    `arch` for `tokenizer`."""
    arch: Architecture = field(default_factory=Architecture)
    """Shape of a fresh model."""
    tokenizer: str = ""
    """Folder of the tokenizer of a fresh model; empty: one of `vocab_size` is trained on the data."""
    vocab_size: int = 8192
    """Token ids of a tokenizer trained on the data."""

    data: DataConfig
    """What to train on; prepared in `out`/data unless it is one folder of prepared data, or streams. Its hold-out
    validates."""
    seq_len: int = 1024
    """Clean tokens of a row; the forward holds twice as many."""
    batch_tokens: int = 131_072
    """Clean tokens of an optimizer step; a multiple of `micro_batch` rows."""
    micro_batch: int = 64
    """Rows of one forward; fewer need less memory and change nothing else (of streams: as long as `data.lanes` is a
    multiple of the micro-batches of a step)."""
    mask_slice: int = 0
    """Masks of a row that one forward holds at most; 0: all, and the clean tokens with them. For long rows: less memory
    for somewhat more time, and nothing else changes."""
    tokens: int = 100_000_000
    """Clean tokens of the whole run."""

    objective: Literal["tidar", "ar"] = "tidar"
    """`tidar`: both losses of the paper. `ar`: next-token prediction alone (the base, and the control)."""
    block_sizes: tuple[int, ...] = (16,)
    """Draft lengths k; one is drawn for every step."""
    random_phase: bool = True
    """Let each step's first blocks be short by a drawn number of tokens, since decoding starts blocks anywhere."""
    alpha: float = 1.0
    """Weight of the AR loss: L = [alpha * L_AR + L_draft] / (1 + alpha)."""
    kl_weight: float = 0.75
    """What the draft learns: 0 the text (cross-entropy, as in the paper), 1 the AR distribution of the same forward
    (KL), else a mix."""
    kl_from: float | None = None
    """`kl_weight` at the run's beginning, from which it moves evenly to its own by the end; by default it stays."""
    draft_text: Literal["corpus", "model"] = "corpus"
    """What the drafts are to be: `corpus`: the text. `model`: how the model itself goes on at the start of each block,
    which is what decoding wants of them."""
    rollout_sampled: float = 0.0
    """Share of the blocks in which the model's own text is sampled; in the others it is greedy."""
    rollout_temperature: float = 1.0
    """Temperature of that sampling."""
    transition: int = 256
    """Width of a transition (`tidar.transition`) that a model without one gets with objective `tidar`; 0: none, as in
    the paper. Drafts are far better with it for the same tokens (docs/recipes.md)."""
    offset_decay: float = 0.87
    """A draft at offset j of its block weighs offset_decay^j: what stands behind a wrong draft is of no use. 1 in the
    paper."""
    adapter_rank: int = 0
    """Rank of adapters that act on masks alone (`tidar.adapters`), for a model that has none: they are trained and the
    model is frozen, so its text stays what it is. 0 leaves the model as it is."""
    adapter_alpha: float = 64.0
    """What an adapter adds is scaled by alpha / rank."""
    adapter_modules: tuple[str, ...] = ()
    """Linear layers to adapt, such as `q_proj v_proj`; all within the decoder's layers by default."""
    adapter_embedding: bool = True
    """Train the masks' embedding too, which is the adapters' own."""
    masking: Literal["full", "random"] = "full"
    """`full`: every draft position is a mask. `random`: the usual diffusion noise, for the paper's ablation."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """For the matrices; embeddings, head and norms always have AdamW."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup: float = 0.01
    """Share of `tokens` over which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; embeddings, norms and biases have none."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.95
    """Adam's decay of the mean squared gradient."""
    clip: float = 1.0
    """Largest norm of the gradient."""

    seed: int = 0
    """Key of the initial weights, the data order and the blocks drawn."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: products in bf16, weights and optimizer in fp32."""
    compile: bool = True
    """Compile the model on a GPU."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward: less memory, about a third more time."""

    log_every: int = 10
    """Steps between two lines of metrics; a NaN is noticed then."""
    eval_every: int = 0
    """Steps between two validations; 0: at the end only."""
    eval_tokens: int = 65_536
    """Held-out tokens of one validation."""
    save_every: int = 0
    """Steps between two checkpoints; 0: at the end only."""
    keep_last: int = 2
    """Checkpoints to keep."""
    max_seconds: float = 0.0
    """Stop, resumably, after this wall-clock time of training; 0: never."""
    stop_at: float = 0.0
    """Stop, resumably, at this UNIX time, restarts by torchrun or not; 0: never."""

    def kl_at(self, tokens: int) -> float | None:
        """The share of KL after so many clean tokens; None in a run without KL."""
        if not (self.kl_weight or self.kl_from):
            return None
        begun = self.kl_weight if self.kl_from is None else self.kl_from
        return begun + (self.kl_weight - begun) * min(1.0, tokens / self.tokens)

    @property
    def accumulate(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.batch_tokens // (self.micro_batch * self.seq_len)

    @property
    def lanes(self) -> int:
        """Lanes of streamed data: the first number from `data.lanes` on that divides the rows of a step and that the
        micro-batches divide; with as many rows as lanes at the most."""
        rows = self.batch_tokens // self.seq_len
        return next((n for n in range(self.data.lanes, rows) if rows % n == 0 == n % self.accumulate), rows)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "micro_batch", "tokens", "log_every", "keep_last", "eval_tokens"):
            if getattr(self, name) < 1:
                raise TidarError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_tokens < 1 or self.batch_tokens % (self.micro_batch * self.seq_len):
            raise TidarError(
                f"batch_tokens {self.batch_tokens} must be a multiple of micro_batch x seq_len = "
                f"{self.micro_batch * self.seq_len}"
            )
        if not self.block_sizes or min(self.block_sizes) < 1:
            raise TidarError(f"block_sizes must be draft lengths of at least 1, not {list(self.block_sizes)}")
        if self.mask_slice and (self.objective == "ar" or self.mask_slice < 2 * max(self.block_sizes)):
            raise TidarError(
                f"mask_slice must be 0, or at least twice the longest of block_sizes {list(self.block_sizes)} and for "
                f"objective tidar, not {self.mask_slice}"
            )
        if self.alpha < 0:
            raise TidarError(f"alpha must be at least 0, not {self.alpha}")
        for name in ("kl_weight", "kl_from"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise TidarError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.rollout_sampled <= 1:
            raise TidarError(f"rollout_sampled must lie in [0, 1], not {self.rollout_sampled}")
        if self.rollout_temperature <= 0:
            raise TidarError(
                f"rollout_temperature must be above 0, not {self.rollout_temperature}; rollout_sampled 0 is greedy"
            )
        if not 0 < self.offset_decay <= 1:
            raise TidarError(f"offset_decay must lie in (0, 1], not {self.offset_decay}")
        if self.transition < 0:
            raise TidarError(f"transition must be a width of at least 0, not {self.transition}")
        if self.draft_text == "model" and self.masking == "random":
            raise TidarError("draft_text model needs masking full: random masking shows parts of the corpus text")
        if self.adapter_rank < 0 or self.adapter_alpha <= 0:
            raise TidarError(
                f"adapter_rank must be at least 0 and adapter_alpha above 0, not {self.adapter_rank} and "
                f"{self.adapter_alpha}"
            )
        if self.adapter_rank and (self.objective == "ar" or self.masking == "random"):
            raise TidarError("adapters act on masks: they need objective tidar and masking full")
        if self.adapter_rank and not self.model:
            raise TidarError("adapters need a base: name one by model")
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise TidarError(f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}, which must be above 0")
        if not 0 <= self.warmup < 1:
            raise TidarError(f"warmup must lie in [0, 1), not {self.warmup}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.weight_decay >= 0):
            raise TidarError("beta1 and beta2 must lie in [0, 1), and weight_decay must be at least 0")
        if self.max_seconds < 0 or self.stop_at < 0:
            raise TidarError(f"max_seconds and stop_at must be at least 0, not {self.max_seconds} and {self.stop_at}")
        if self.clip <= 0:
            raise TidarError(f"clip must be above 0, not {self.clip}")
