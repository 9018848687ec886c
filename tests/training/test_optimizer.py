import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posjax.encodings import registry
from posjax.models import Transformer, TransformerConfig
from posjax.training import OptimizerConfig
from posjax.training.optimizer import decayed, make_optimizer, make_schedule, of_encoding


def rates(steps, **fields):
    schedule = make_schedule(OptimizerConfig(**fields), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_cosine_by_its_formula():
    values = rates(20, learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    np.testing.assert_allclose(values[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    for step in range(4, 21):
        half = (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        assert values[step] == pytest.approx(2.0 * (0.9 * half + 0.1), rel=1e-5)
    assert values[20] == pytest.approx(0.2, rel=1e-5)


def test_linear_and_constant():
    values = rates(10, learning_rate=1.0, warmup_steps=2, schedule="linear", final_fraction=0.0)
    np.testing.assert_allclose(values, [0.5, 1.0, *np.linspace(1, 0, 9)], atol=1e-6)
    values = rates(5, learning_rate=1.0, warmup_steps=2, schedule="constant")
    np.testing.assert_allclose(values, [0.5, 1, 1, 1, 1, 1], rtol=1e-6)


def test_no_warm_up_and_a_run_shorter_than_it():
    assert rates(3, learning_rate=1.0, warmup_steps=0)[0] == 1.0
    np.testing.assert_allclose(
        rates(3, learning_rate=1.0, warmup_steps=10), [0.1, 0.2, 0.3, 0.4], rtol=1e-6
    )


def params_of(encoding):
    """Shapes of the parameters of a real model."""
    model = Transformer(
        TransformerConfig(layers=1, heads=1, width=8),
        vocab_size=3,
        encoding=registry.create(encoding),
    )
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def paths(mask):
    leaves = jax.tree_util.tree_flatten_with_path(mask)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if leaf}


@pytest.mark.parametrize("encoding", ["cope", "learned", "nope"])
def test_kernels_alone_decay(encoding):
    params = params_of(encoding)
    everything = paths(jax.tree.map(lambda _: True, params))
    chosen = paths(decayed(params))
    assert chosen == {p for p in everything if p.endswith("/kernel") and "encoding" not in p}
    assert chosen and any("embedding" in path for path in everything - chosen)
    assert any(path.endswith(("scale", "bias")) for path in everything - chosen)


def test_encodings_are_found_by_their_path():
    params = params_of("cope")
    assert paths(of_encoding(params)) == {
        p for p in paths(jax.tree.map(lambda _: True, params)) if "encoding" in p.split("/")
    }
    assert paths(of_encoding(params))
    assert not paths(of_encoding(params_of("nope")))


PARAMS = {
    "dense": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)},
    "encoding": {"table": jnp.full((3,), 2.0), "kernel": jnp.full((3,), 2.0)},
}


def one_step(**fields):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", **fields)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    return jax.tree.map(lambda x: float(x.reshape(-1)[0]), updates)


def test_the_multiplier_acts_on_encodings_alone():
    updates = one_step(encoding_learning_rate_multiplier=3.0)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["dense"]["bias"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["encoding"]["table"], -0.3, rtol=1e-5)


def test_weight_decay_is_decoupled_and_masked():
    updates = one_step(weight_decay=0.5)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.1 * (1 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["dense"]["bias"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["encoding"]["kernel"], -0.1, rtol=1e-5)


def test_clipping_is_by_the_global_norm():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="constant", clip_norm=1.0)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 100.0), PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    moment = optax.tree.norm(adam.mu)
    np.testing.assert_allclose(moment, 0.1 * 1.0, rtol=1e-5)  # (1 - b1) times the clipped gradient
