"""A sample of the wrong values of tests/fuzz_arguments.py."""

import random

import pytest

from tests import fuzz_arguments

SAMPLE = 250


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        every, _ = fuzz_arguments.cases()
        return fuzz_arguments.run(random.Random(0).sample(every, SAMPLE))


def of(findings, verdict):
    return [
        (f.case.name, f.case.argument, f.case.kind, f.said)
        for f in findings
        if f.verdict == verdict
    ]


def test_no_wrong_value_hangs(findings):
    assert not of(findings, "hang")
