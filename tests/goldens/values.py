"""Recorded numbers, and comparison with them; make_values.py records them."""

import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np

FILE = Path(__file__).with_name("values.json")


def summary(tree) -> dict:
    """A digest of all bits, and two numbers of each array: norm and a product with a fixed wave."""
    digest, numbers = hashlib.sha256(), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf, np.float32)
        digest.update(array.tobytes())
        flat = array.reshape(-1).astype(np.float64)
        wave = np.cos(np.arange(flat.size))
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers[key] = [round(float(x), 6) for x in (np.linalg.norm(flat), flat @ wave)]
    return {"digest": digest.hexdigest()[:16], "numbers": numbers}


@functools.cache
def recorded() -> dict:
    """What the file holds."""
    return json.loads(FILE.read_text())


def compare(tree, name: str, way: str) -> None:
    """The numbers of a tree are the recorded ones, up to the last digits."""
    found, want = summary(tree)["numbers"], recorded()[name][way]["numbers"]
    assert found.keys() == want.keys()
    for key, numbers in want.items():
        atol = 2e-4 * max(1.0, numbers[0])
        np.testing.assert_allclose(found[key], numbers, rtol=0, atol=atol, err_msg=key)
