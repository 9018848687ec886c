import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.models import Transformer
from posjax.training import MeshConfig
from posjax.training.mesh import check_batch_sizes, make_mesh, to_devices
from posjax.training.optimizer import make_optimizer, make_schedule
from posjax.training.state import initial_state, step_keys
from posjax.training.step import cross_entropy_sum, make_train_step
from tests.training.tiny import TASK, Toy, assert_same_bits, tiny


def batch_of(step, size=8):
    examples = [TASK.example(step * size + row) for row in range(size)]
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def train(config, steps=4, model=None, batch=batch_of):
    """The state after some steps, and the metrics of each."""
    mesh = make_mesh(config.mesh)
    model = model or Toy(config.model, TASK.vocabulary.size)
    optimizer = make_optimizer(
        config.optimizer, make_schedule(config.optimizer, config.train.steps)
    )
    state = initial_state(model, optimizer, TASK.length, config.seed, mesh)
    step = make_train_step(model, config, mesh)
    metrics = []
    for index in range(steps):
        state, values = step(state, to_devices(batch(index), mesh))
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


@pytest.fixture(scope="module")
def reference():
    return train(tiny())


def losses(metrics):
    return [values["loss"] for values in metrics]


def test_same_seed_same_bits_and_other_seed_others(reference):
    state, metrics = train(tiny())
    assert_same_bits(state, reference[0])
    assert metrics == reference[1]
    other, _ = train(tiny(seed=1), steps=1)
    pairs = zip(jax.tree.leaves(other.params), jax.tree.leaves(reference[0].params), strict=True)
    assert any(bool(jnp.any(a != b)) for a, b in pairs)


def test_metrics_of_a_step(reference):
    state, metrics = reference
    assert int(state.step) == 4
    assert set(metrics[0]) == {"loss", "gradient_norm", "learning_rate"}
    np.testing.assert_allclose([m["learning_rate"] for m in metrics[:2]], [0.005, 0.01], rtol=1e-6)
    assert 0 < metrics[0]["loss"] < 3 and metrics[0]["gradient_norm"] > 0


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(reference, parts):
    state, metrics = train(tiny(train__accumulate=parts))
    np.testing.assert_allclose(losses(metrics), losses(reference[1]), atol=1e-6)
    norms = ([m["gradient_norm"] for m in run] for run in (metrics, reference[1]))
    np.testing.assert_allclose(*norms, rtol=1e-5)
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(reference[0].params), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def weighted(step):
    """Rows of very different weight: a mean of the means of parts would be wrong."""
    batch = batch_of(step)
    rows = np.float32([0, 0, 1, 2, 3, 0, 0, 9])[:, None]
    return {**batch, "loss_weights": batch["loss_weights"] * rows}


def test_accumulation_divides_by_the_weight_of_the_whole_batch():
    whole, parts = (train(tiny(train__accumulate=n), batch=weighted)[1] for n in (1, 4))
    np.testing.assert_allclose(losses(whole), losses(parts), atol=1e-6)


def test_eight_devices_equal_one(reference):
    state, metrics = train(tiny(mesh__data=8))
    np.testing.assert_allclose(losses(metrics), losses(reference[1]), atol=1e-5)
    assert jax.tree.leaves(state.params)[0].sharding.num_devices == 8


def test_accumulation_on_two_devices(reference):
    _, metrics = train(tiny(mesh__data=2, train__accumulate=2))
    np.testing.assert_allclose(losses(metrics), losses(reference[1]), atol=1e-5)


@pytest.mark.slow
def test_eight_devices_equal_one_with_attention():
    runs = []
    for data in (1, 8):
        config = tiny(mesh__data=data)
        model = Transformer(config.model, vocab_size=TASK.vocabulary.size, encoding=config.encoding)
        runs.append(losses(train(config, steps=6, model=model)[1]))
    np.testing.assert_allclose(*runs, atol=1e-5)


def test_loss_falls():
    config = tiny(optimizer__learning_rate=3e-2, train__steps=60)
    _, metrics = train(config, steps=60, batch=lambda _: batch_of(0))
    assert np.mean(losses(metrics)[-5:]) < 0.6 * metrics[0]["loss"]


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    batch = {"targets": jnp.array([[1, 2]]), "loss_weights": jnp.array([[2.0, 0.5]])}
    want = 2 * np.log(4) - 0.5 * np.log(0.8)
    np.testing.assert_allclose(cross_entropy_sum(logits, batch), want, rtol=1e-6)
    assert cross_entropy_sum(logits.astype(jnp.bfloat16), batch).dtype == jnp.float32


def test_a_batch_without_weight_is_no_step():
    def empty(step):
        batch = batch_of(step)
        return {**batch, "loss_weights": np.zeros_like(batch["loss_weights"])}

    _, metrics = train(tiny(), steps=1, batch=empty)
    assert metrics[0]["loss"] == 0.0 and metrics[0]["gradient_norm"] == 0.0


def test_random_keys_depend_on_seed_step_and_part():
    def draw(*arguments):
        return {k: jax.random.key_data(v).tolist() for k, v in step_keys(*arguments).items()}

    base = draw(0, jnp.int32(3), 0)
    assert base == draw(0, jnp.int32(3), 0)
    assert base["dropout"] != base["encoding"]
    for other in (draw(1, jnp.int32(3), 0), draw(0, jnp.int32(4), 0), draw(0, jnp.int32(3), 1)):
        assert other["dropout"] != base["dropout"]


def test_dropout_is_on_in_training_and_differs_by_step():
    config = tiny(model__dropout=0.5, optimizer__learning_rate=1e-9)
    _, metrics = train(config, steps=2, batch=lambda _: batch_of(0))
    assert abs(metrics[0]["loss"] - metrics[1]["loss"]) > 1e-4


class TestMesh:
    def test_data_takes_the_rest_or_the_first_devices(self):
        assert make_mesh(MeshConfig()).shape == {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}
        assert make_mesh(MeshConfig(data=2)).devices.size == 2

    def test_more_devices_than_there_are(self):
        with pytest.raises(ValueError, match=r"mesh\.data is 9; it must be at most 8"):
            make_mesh(MeshConfig(data=9))

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"batch_size": 12}, "train.batch_size is 12; it must be a multiple of .*, 8"),
            ({"accumulate": 2}, "train.batch_size / train.accumulate is 4"),
            ({"evaluation_batch_size": 4}, "train.evaluation_batch_size is 4"),
        ],
    )
    def test_rows_that_do_not_divide(self, fields, words):
        train_config = dataclasses.replace(tiny().train, **fields)
        with pytest.raises(ValueError, match=words):
            check_batch_sizes(train_config, make_mesh(MeshConfig()))

    def test_batches_land_in_rows(self):
        mesh = make_mesh(MeshConfig())
        for whole in (False, True):
            placed = to_devices(batch_of(0), mesh, whole=whole)["inputs"]
            np.testing.assert_array_equal(placed, batch_of(0)["inputs"])
            assert placed.addressable_shards[0].data.shape[0] == 1
