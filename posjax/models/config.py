"""The settings of a transformer."""

import dataclasses
from typing import Literal

from posjax import checks
from posjax.encodings.base import Sizes
from posjax.types import Implementation

__all__ = ["TransformerConfig"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer."""

    layers: int = 2
    """Number of blocks."""
    heads: int = 2
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads; they divide the query heads. None: as many as query heads."""
    width: int = 64
    """Size of the residual stream."""
    head_size: int | None = None
    """Size of a head. None: width / heads."""
    mlp: Literal["gelu", "relu", "swiglu", "geglu"] = "gelu"
    """Activation of the MLP; the gated ones have a second input matrix."""
    mlp_ratio: float = 4.0
    """Hidden size of the MLP, in widths."""
    norm: Literal["pre", "post"] = "pre"
    """Normalise before each sublayer (and once at the end), or after each residual sum."""
    norm_kind: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm."""
    tied_embeddings: bool = False
    """Use the token embedding as output head."""
    dropout: float = 0.0
    """Dropout of embeddings and of each sublayer's output."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations. Norms, softmax, gates, counts and logits are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    scan_layers: bool = False
    """Compile one block and scan over the layers; parameters get a leading layer axis."""
    local_window: int | None = None
    """How many positions back attention sees. None: all."""
    implementation: Implementation | None = None
    """Implementation of attention. None: posjax chooses."""

    def __post_init__(self):
        names = ("layers", "heads", "kv_heads", "width", "head_size")
        sizes = dict.fromkeys(names, checks.size())
        checks.fields(
            self,
            "model.",
            **sizes,
            mlp_ratio=checks.above(0),
            dropout=checks.Limits(low=0, below=1),
            local_window=checks.at_least(0),
        )
        divides = self.head_size is not None or self.width % self.heads == 0
        wanted = f"a divisor of model.width = {self.width}, unless model.head_size is given"
        checks.require("model.heads", self.heads, divides, wanted)
        divides = self.heads % self.key_heads == 0
        wanted = f"a divisor of model.heads = {self.heads}"
        checks.require("model.kv_heads", self.kv_heads, divides, wanted)
        hidden = round(self.mlp_ratio * self.width)
        wanted = f"enough for a hidden channel with model.width = {self.width}"
        checks.require("model.mlp_ratio", self.mlp_ratio, hidden >= 1, wanted)
        wanted = f"at most {checks.LARGEST / self.width}, with model.width = {self.width}"
        checks.require("model.mlp_ratio", self.mlp_ratio, hidden <= checks.LARGEST, wanted)

    @property
    def size_of_head(self) -> int:
        """H."""
        return self.head_size or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """K."""
        return self.kv_heads or self.heads

    @property
    def sizes(self) -> Sizes:
        """N, K and H."""
        return Sizes(self.heads, self.key_heads, self.size_of_head)
