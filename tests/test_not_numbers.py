"""NaN in an argument gives NaN, an error, or a number that stands for none; never a healthy one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import alignment
from posjax.encodings.ms_poe import position_awareness
from posjax.encodings.t5 import BucketTable, t5_buckets
from posjax.frequencies import DynamicNTK, LongRoPE
from posjax.graphs.random_feature import orthonormal, propagate
from posjax.graphs.random_walk import random_walk_returns

NAN = float("nan")
LOGITS = jnp.array([[[1.0, NAN, 2.0], [1.0, 0.5, 2.0]]])
HEALTHY = jnp.array([[[1.0, 0.0, 2.0]]])
ALL = {
    "entropy": lambda: alignment.attention_entropy(LOGITS),
    "max probability": lambda: alignment.max_probability(LOGITS),
    "entropy of the trained": lambda: alignment.align_entropy(LOGITS, HEALTHY),
    "entropy of the target": lambda: alignment.align_entropy(HEALTHY, LOGITS),
    "probability of the trained": lambda: alignment.align_max_probability(LOGITS, HEALTHY),
    "probability of the target": lambda: alignment.align_max_probability(HEALTHY, LOGITS),
    "orthonormal": lambda: orthonormal(jnp.full((3, 2), NAN)),
    "length": lambda: propagate(jnp.eye(3), jnp.full((3, 1), NAN), 2, "length"),
    "operator": lambda: propagate(jnp.full((3, 3), NAN), jnp.ones((3, 1)), 2)[:, 1:],
    "random walk": lambda: random_walk_returns(jnp.full((2, 2), NAN), 2),
    "dynamic": lambda: DynamicNTK()(4, 10.0, jnp.array([NAN]))[0][:, 1:],
    "longrope": lambda: LongRoPE()(4, 10.0, jnp.array([NAN]))[0],
    "bias of T5": lambda: BucketTable()(jnp.ones((32, 2)), jnp.full((1, 1, 2, 2), NAN)),
}


@pytest.mark.parametrize("name", ALL)
def test_nan_stays(name):
    for found in (ALL[name](), jax.jit(ALL[name])()):
        assert bool(jnp.isnan(found).all())


def test_whole_numbers_that_stand_for_none():
    places = jnp.array([NAN, -1.0, -200.0])
    np.testing.assert_array_equal(t5_buckets(places), [-1, 1, 31])
    weights = jnp.full((2, 3, 3), NAN)
    np.testing.assert_array_equal(jax.jit(position_awareness)(weights), [-1, -1])
    with pytest.raises(ValueError, match="weights holds nan"):
        position_awareness(weights)
