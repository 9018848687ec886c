"""A decoder-only transformer that takes its position encoding as an argument."""

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.encodings.stream import stream_of
from posjax.models.config import TransformerConfig
from posjax.models.inputs import check_cache, known_tokens, room, row_of_each
from posjax.models.layers import Block, Cache, Context, check_held, norm, write_all
from posjax.positions import segment_positions, sequence_positions
from posjax.types import Array, Float, Int, PyTree

__all__ = ["Cache", "Transformer"]


class Transformer(nn.Module):
    """A decoder-only transformer: token embedding, L blocks, norm, output head.

    Parameters (D width, N and K heads of size H, F = mlp_ratio * D, V vocabulary), besides the
    encoding's own:

        embedding     V D                  normal, deviation D^-0.5
        each block    2 D H (N + K)        attention kernels, without bias
                      2 D F + F + D        MLP; with a gate 3 D F + 2 F + D
                      4 D                  two LayerNorms; RMSNorm 2 D
        final norm    2 D                  only norm="pre"; RMSNorm D
        head          V D                  unless tied_embeddings

    Kernels start normal with variance 1 / inputs; those that write to the residual stream are
    smaller by sqrt(2 L). The encoding's parameters are under "encoding": those made once at the
    top, those of a layer in its block.

    >>> import jax
    >>> model = Transformer(TransformerConfig(), vocab_size=7)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    >>> model.apply(params, jnp.zeros((1, 3), jnp.int32)).shape
    (1, 3, 7)
    """

    config: TransformerConfig
    vocab_size: int
    encoding: PositionEncoding | None = None

    def __post_init__(self):
        checks.fields(self, vocab_size=checks.at_least(1))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
        keep: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], Cache]:
        """Logits for the next token at every place, in float32.

        Args:
            positions: passed to the encoding, [T], [1, T] or [B, T]; by default 0, 1, ..., starting
                again in every packed segment.
            segment_ids: tokens see only tokens of the same segment; likewise.
            deterministic: False in training: dropout (rng stream "dropout") and random positions
                ("encoding").
            cache: the tokens before these; the result is then (logits, cache). Logits of tokens
                for which it has no room are NaN, if a compiled program cannot raise.
            keep: return (logits, cache) also without a cache to start from.

        Raises:
            ValueError: segment_ids together with a cache; a cache of another model; an encoding
                that reads following tokens; tokens outside the vocabulary, or more than the cache
                has room for, where their values are known (otherwise their logits are NaN).
            NotImplementedError: a cache with an encoding that cannot decode.
            posjax.positions.LengthError: more tokens than a table of the encoding has rows.
        """
        if cache is not None and segment_ids is not None:
            raise ValueError(
                "segment_ids and cache cannot be used together: a cache holds one sequence a row."
            )
        config, encoding = self.config, self.encoding
        if encoding is None:
            encoding = PositionEncoding(parent=None)
        name = type(encoding).__name__
        if encoding.reads_ahead:
            raise ValueError(
                f"{name} reads tokens that follow; this model is causal and would see its own "
                "targets. Use the encoding in a model that attends in both directions."
            )
        if cache is not None and not encoding.decodes:
            raise NotImplementedError(
                f"{name} cannot decode with a cache: run the model on all tokens."
            )
        checks.flag("deterministic", deterministic)
        checks.flag("keep", keep)
        is_known = known_tokens(tokens, self.vocab_size)
        positions = row_of_each("positions", positions, tokens)
        segment_ids = row_of_each("segment_ids", segment_ids, tokens)
        has_room = None
        if cache is not None:
            check_cache(cache, config, len(tokens))
            has_room = room(cache, tokens.shape[1])
        context, carry = self._context(
            encoding, tokens, positions, segment_ids, deterministic, cache
        )
        embedding = nn.Embed(
            self.vocab_size,
            config.width,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.initializers.normal(config.width**-0.5),
            name="embedding",
        )
        embedded = embedding(jnp.where(is_known, tokens, 0))
        embedded = jnp.where(is_known[..., None], embedded, jnp.nan)
        x = encoding.embed(embedded, context.query_indices)
        x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
        flow = x, stream_of(encoding).init_state(context.query_indices, config.sizes)
        x, layers = self._blocks(flow, encoding, context, cache, deterministic)
        logits = self._head(x, embedding)
        if has_room is not None:
            logits = jnp.where(has_room[None, :, None], logits, jnp.nan)
        if cache is None and not keep:
            return logits
        seen = tokens.shape[1] if cache is None else cache.length + tokens.shape[1]
        return logits, Cache(jnp.asarray(seen, jnp.int32), carry, context.key_indices, layers)

    def _context(
        self, encoding, tokens, positions, segment_ids, deterministic, cache
    ) -> tuple[Context, PyTree]:
        """Place 1, and what else all layers share."""
        batch, length = tokens.shape
        offset = None if cache is None else cache.length
        rows = sequence_positions(1, length, 0 if cache is None else offset)
        places = jnp.broadcast_to(rows, (batch, length))
        if positions is None:
            positions = places if segment_ids is None else segment_positions(segment_ids)
        indices, carry = encoding.positions(
            tokens,
            positions,
            None if cache is None else cache.carry,
            segment_ids=segment_ids,
            deterministic=deterministic,
        )
        if cache is not None:
            check_held("carry of cache", cache.carry, carry)
        keys = write_all(None if cache is None else cache.indices, indices, offset)
        shared = encoding.shared(self.config.sizes)
        places = None if cache is None else places
        return Context(indices, keys, rows[0], places, segment_ids, shared, offset), carry

    def _blocks(self, flow, encoding, context: Context, cache: Cache | None, deterministic: bool):
        """All blocks, one after another or scanned."""
        config = self.config
        # Unbound: each layer makes its own parameters.
        encodings = [encoding.layer(index, config.layers) for index in range(config.layers)]
        block = nn.remat(Block, prevent_cse=not config.scan_layers) if config.remat else Block
        if config.scan_layers:
            if any(other != encodings[0] for other in encodings):
                raise ValueError(
                    f"scan_layers needs the same encoding in every layer, but the layers of "
                    f"{type(encoding).__name__} differ; use scan_layers=False."
                )
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True, "encoding": True},
                in_axes=(0 if cache is not None else nn.broadcast, nn.broadcast),
                length=config.layers,
            )
            layers = scanned(config, encodings[0], deterministic, name="layers")
            (x, _), states = layers(flow, None if cache is None else cache.layers, context)
            return x, states
        states = []
        for index, encoding in enumerate(encodings):
            cached = None if cache is None else cache.layers[index]
            layer = block(config, encoding, deterministic, name=f"layer_{index}")
            flow, state = layer(flow, cached, context)
            states.append(state)
        return flow[0], tuple(states)

    def _head(self, x, embedding: nn.Embed) -> Float[Array, "B T V"]:
        if self.config.norm == "pre":
            x = norm(self.config, "final_norm")(x)
        if self.config.tied_embeddings:
            return embedding.attend(x).astype(jnp.float32)
        kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        head = nn.Dense(
            self.vocab_size,
            use_bias=False,
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            kernel_init=kernel_init,
            name="head",
        )
        return head(x).astype(jnp.float32)
