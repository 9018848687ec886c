"""The table of implementations: who is asked, who is chosen, and what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import (
    ContextualBias,
    RelativeBias,
    dot_product_attention,
    explain,
    implementations_used,
)
from posjax.implementations import IMPLEMENTATIONS, Implementation
from posjax.kernels import blocks
from tests.cases import linear

QUERY = jnp.ones((1, 8, 2, 4))
FORWARD = ContextualBias(jnp.ones((3, 4)), direction="forward")


def described(platform: str):
    """A context in which programs are traced for a device that is not here."""
    device = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_explain_raises_what_the_call_raises(name, jitted):
    call = lambda q: dot_product_attention(q, q, q, implementation=name)  # noqa: E731
    query = QUERY.astype(jnp.bfloat16)
    words = f"the {name.upper()} kernels need {name.upper()}s, and the devices are cpus; use"
    with pytest.raises(NotImplementedError, match=words) as by_call:
        (jax.jit(call) if jitted else call)(query)
    with pytest.raises(NotImplementedError) as by_explain:
        explain(query, query, query, implementation=name)
    assert str(by_call.value) == str(by_explain.value)


@pytest.mark.parametrize("name", ["xla", "jax", None])
def test_a_refusal_names_what_can(name):
    words = "direction=.*use implementation=.reference" if name == "xla" else "reference"
    with pytest.raises(NotImplementedError, match=words):
        dot_product_attention(QUERY, QUERY, QUERY, FORWARD, implementation=name)


def test_of_several_names_the_first_that_can():
    with implementations_used() as used:
        dot_product_attention(QUERY, QUERY, QUERY, implementation=("tpu", "xla"))
        dot_product_attention(QUERY, QUERY, QUERY, FORWARD, implementation=["xla", "reference"])
    assert used == ["xla", "reference"]
    assert explain(QUERY, QUERY, QUERY, implementation=("tpu", "jax")).splitlines()[0] == "jax"
    with pytest.raises(NotImplementedError, match=r"TPUs.*GPUs.*use implementation="):
        dot_product_attention(*[QUERY.astype(jnp.bfloat16)] * 3, implementation=("tpu", "gpu"))


@pytest.mark.parametrize("wrong", ["flash", (), ("xla", "flash"), 3, (3,), ["xla", None]])
def test_a_name_that_there_is_not(wrong):
    with pytest.raises(ValueError, match=r"implementation is .* it must be None, one of "):
        dot_product_attention(QUERY, QUERY, QUERY, implementation=wrong)


def test_only_those_that_are_tried_are_asked(monkeypatch):
    asked = []

    def refuses(row, problem):
        asked.append(row.name)

    monkeypatch.setattr(Implementation, "refuses", refuses)
    dot_product_attention(QUERY, QUERY, QUERY, implementation="reference")
    assert asked == ["reference"]
    dot_product_attention(QUERY, QUERY, QUERY, implementation=("xla", "tpu"))
    assert asked == ["reference", "xla"]


def test_every_row_has_what_the_table_calls():
    problem_free = {"refuses", "run"}
    for row in IMPLEMENTATIONS:
        names = problem_free | ({"holds"} if row.instead is not None else set())
        assert all(callable(getattr(row.load(), name)) for name in names), row.name
    assert len({row.name for row in IMPLEMENTATIONS}) == len(IMPLEMENTATIONS)


def test_the_table_follows_the_device_that_is_traced_for():
    query = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    short = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    assert blocks.platform() == "cpu"
    with described("tpu"):
        assert blocks.platform() == "tpu"
        assert explain(query, query, query).splitlines()[0] == "tpu"
        assert "not tpu: 64 queries; tpu pays from 128 on" in explain(short, short, short)
    assert "not tpu: the TPU kernels need TPUs" in explain(query, query, query)


def test_positions_known_only_at_run_time_are_said():
    """Contiguous ones go to the kernel, others to blockwise attention; a trace knows of neither."""
    query = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    bias = RelativeBias(linear, jnp.ones(2), distance_only=True)
    call = lambda q, positions: dot_product_attention(  # noqa: E731
        q, q, q, bias, query_positions=positions, key_positions=positions
    )
    with described("tpu"):
        settings = {"query_positions": jnp.arange(128) * 2, "key_positions": jnp.arange(128) * 2}
        assert explain(query, query, query, bias).splitlines()[0] == "tpu"
        assert explain(query, query, query, bias, **settings).splitlines()[0] == "xla"
        with implementations_used() as used:
            jax.eval_shape(call, query, jnp.arange(128))
    assert used == ["tpu or xla"]


def test_default_device_counts():
    device = jax.devices("cpu")[1]
    with jax.default_device(device):
        assert blocks.platform() == "cpu"
        np.testing.assert_array_equal(dot_product_attention(QUERY, QUERY, QUERY), QUERY)
