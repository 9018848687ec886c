"""Evaluation of a model that gives no numbers."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax.encodings import Huang
from posjax.models import Transformer
from posjax.training.evaluate import evaluate
from posjax.training.mesh import make_mesh
from posjax.training.step import make_evaluate_step
from tests.training.tiny import TASK, tiny


def test_a_split_whose_logits_are_not_numbers_is_not_available():
    task = dataclasses.replace(TASK, sparse_blanks=9)
    config = tiny(task=task, encoding=Huang(max_distance=task.length, strict=True))
    model = Transformer(config.model, task.vocabulary.size, config.encoding)
    params = model.init(jax.random.key(0), jnp.ones((1, 3), jnp.int32))["params"]
    mesh = make_mesh(config.mesh)
    step = make_evaluate_step(model, task, mesh)
    found = evaluate(step, task, params, mesh, 8, check=lambda: None)
    assert found.metrics["sparse"] is None
    wanted = "the logits of 24 of 24 scored tokens are not numbers"
    assert found.unavailable == {"sparse": wanted}
    assert sorted(found.metrics["dense"]) == ["sequence_error", "token_error"]
