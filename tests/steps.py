"""A language model's training step, compiled for many chips that are not there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from posjax.encodings import PositionEncoding
from posjax.models import Transformer, TransformerConfig

__all__ = ["compiled_step"]


def compiled_step(
    topology: topologies.TopologyDescription,
    mesh: dict[str, int],
    config: TransformerConfig,
    encoding: PositionEncoding,
) -> str:
    """The program of one step of SGD on 16 sequences of 512 tokens, over a mesh with these axes."""
    mesh = topologies.make_mesh(topology, tuple(mesh.values()), tuple(mesh))
    model = Transformer(config, vocab_size=256, encoding=encoding)

    def place(x, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    tokens = jax.ShapeDtypeStruct((16, 512), jnp.int32)
    key = jax.random.key(0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the chips that it is traced for
        params = jax.eval_shape(model.init, key, tokens)["params"]
    params = jax.tree.map(lambda x: place(x, jax.P()), nn.unbox(params))

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))

    def step(params, tokens):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, tokens))

    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(params, place(tokens, jax.P("data")))
    return lowered.compile().as_text()
