"""A sample of tests/fuzz_arguments.py: some callables, and some wrong values for each."""

import random

import pytest

from tests import fuzz_arguments
from tests.fuzzing.targets import public_callables

CALLABLES, VALUES = 48, 6


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    draw = random.Random(0)
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        for path in draw.sample(sorted(public_callables()), CALLABLES):
            every, _ = fuzz_arguments.cases(path)
            chosen += draw.sample(every, min(VALUES, len(every)))
        return fuzz_arguments.run(chosen)


def of(findings, verdict):
    return [
        f"{f.case.name}({f.case.argument}: {f.case.kind}) {f.said}"
        for f in findings
        if f.verdict == verdict
    ]


@pytest.mark.parametrize("verdict", ["hang", "silent"])
def test_no_wrong_value_hangs_or_is_taken(findings, verdict):
    assert len(findings) > 100
    assert not of(findings, verdict)


def test_refusals_name_the_argument(findings):
    unclear = of(findings, "unclear")
    assert len(unclear) <= 0.02 * len(findings), unclear
