"""Numbers of every encoding and of every kind of bias: outputs and gradients, one seed.

    python -m tests.goldens.make_values                 writes tests/goldens/values.json
    python -m tests.goldens.make_values --out NEW.json  writes another file
    python -m tests.goldens.make_values --against OLD.json   compares bit for bit, on one machine

A change that moves no mathematics leaves the bits as they are on one machine with one version of
jax. Elsewhere the last digits differ; the suites of encodings and of attention compare the numbers
with tolerances (`tests.goldens.values.compare`).
"""

import argparse
import json
import sys
from pathlib import Path

import jax

import posjax.kernels.blocks
from posjax.kernels.blocks import Blocks
from tests import cases
from tests.encodings import test_all
from tests.goldens.values import FILE, summary

RESTRICTIONS = {
    "plain": {},
    "everything": {"segments": True, "window": (9, 0), "mask": True},
    "offset": {"queries": 20, "keys": 47, "offset": True},
}


def of_encoding(name: str) -> dict:
    """Gradients of all parameters, and logits, of a small transformer."""
    posjax.kernels.blocks.blockwise_sizes = lambda queries, keys: Blocks(8, 8)
    found = {}
    for implementation in ("xla", "reference"):
        grads, output = test_all.gradients(name, implementation)
        found[implementation] = summary({"gradients": grads, "logits": output})
    for cached in (test_all.gradients, test_all.variables_of):
        cached.cache_clear()
    jax.clear_caches()
    return found


def of_bias(kind: str) -> dict:
    """Outputs and gradients of attention, unrestricted, with every restriction, and offset."""
    posjax.kernels.blocks.blockwise_sizes = lambda queries, keys: Blocks(8, 16)
    found = {}
    for restriction, settings in RESTRICTIONS.items():
        case = cases.Case(bias=kind, **settings)
        for implementation in ("xla", "reference"):
            output, grads = cases.run_with_gradients(case, *cases.arrays(case), implementation)
            tree = {"gradients": grads, "output": output}
            found[f"{restriction} {implementation}"] = summary(tree)
    jax.clear_caches()
    return found


def main() -> None:
    """Writes or compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--against", type=Path, help="compare with this file instead of writing")
    parser.add_argument("--only", default="", help="only names that contain this")
    options = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    makers = {
        f"encoding {name}": (of_encoding, name) for name in [*test_all.FILES, *test_all.VARIANTS]
    }
    makers |= {f"bias {kind}": (of_bias, kind) for kind in cases.BIASES}
    values = {}
    for number, (name, (make, what)) in enumerate(makers.items(), start=1):
        if options.only in name:
            values[name] = make(what)
            print(f"{number}/{len(makers)} {name}", file=sys.stderr)
    if options.against is None:
        options.out.write_text(json.dumps(values, indent=1) + "\n")
        return
    old = json.loads(options.against.read_text())
    other = sorted(name for name in old if options.only in name and old[name] != values.get(name))
    print(f"{len(values) - len(other)} of {len(values)} are equal, bit for bit")
    for name in other:
        ways = [way for way in old[name] if old[name][way] != values.get(name, {}).get(way)]
        print(f"differs: {name}: {', '.join(ways)}")
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
