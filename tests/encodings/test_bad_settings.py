"""Settings that encodings refuse: one table of them, with every word of the message.

tests/test_bad_arguments.py sweeps over all settings with values of a wrong kind.
"""

import dataclasses

import pytest

from posjax import encodings
from posjax.encodings import registry

CLASSES = sorted(set(registry.classes().values()) - {encodings.PositionEncoding}, key=str)


def with_field(name):
    """The classes of encodings that have a setting of this name."""
    return [
        cls.__name__ for cls in CLASSES if name in {field.name for field in dataclasses.fields(cls)}
    ]


SOME = "a tuple of one or more integers, each at least"
LAYOUTS = {"Sinusoidal": '"interleaved" or "concatenated"'}

# Class, settings (the wrong one first), and what must be said of that one.
TABLE = [
    *((cls, {"base": 1.0}, "above 1") for cls in with_field("base")),
    *((cls, {"initial_deviation": -1.0}, "at least 0") for cls in with_field("initial_deviation")),
    *(
        (cls, {"encoding": "rope"}, "an instance of PositionEncoding")
        for cls in with_field("encoding")
    ),
    *(
        (cls, {"layout": "x"}, LAYOUTS.get(cls, '"half" or "interleaved"'))
        for cls in with_field("layout")
    ),
    ("ALiBi", {"left_bonus": -0.5}, "at least 0"),
    ("ALiBi", {"left_bonus": float("inf")}, "a finite number, at least 0"),
    ("Abacus", {"digits": ()}, f"{SOME} 0"),
    ("Abacus", {"digits": (1, -1)}, f"{SOME} 0"),
    ("Abacus", {"max_offset": -1}, "at least 0"),
    ("Abacus", {"max_length": 100}, "at least max_offset + 2 = 101"),
    ("AbsoluteWindow", {"shape": ()}, f"{SOME} 1"),
    ("AbsoluteWindow", {"shape": (2, 2, 2)}, "one or two sizes"),
    ("AbsoluteWindow", {"window": (0,)}, f"{SOME} 1"),
    ("AbsoluteWindow", {"coarse": (4, 4)}, "as many sizes as shape has, 1"),
    ("AxialRoPE", {"width": 0}, "at least 1"),
    ("BiPE", {"separators": ()}, f"{SOME} 0"),
    ("BiPE", {"separators": (-1,)}, f"{SOME} 0"),
    ("BiPE", {"num_places": 0}, "at least 1"),
    ("BiPE", {"bias_factor": 0.0}, "above 0"),
    ("CONFLATOR", {"second": (-1,)}, "a tuple of integers, each at least 0"),
    (
        "CONFLATOR",
        {"neutral": (7, 6), "second": (5, 6)},
        "without [6], which stand in second",
    ),
    ("CONFLATOR", {"rule": "restart"}, '"reset" or "flip"'),
    ("CoPE", {"num_positions": 1}, "at least 2"),
    ("CoPE", {"gate_source": "query"}, '"logits", "key", "value" or "ones"'),
    ("CoPE", {"table_deviation": -1.0}, "at least 0"),
    ("CoPE", {"every": 0}, "at least 1"),
    ("ComRoPE", {"kind": "ap"}, '"axial" or "linear"'),
    ("ComRoPE", {"block_size": 1}, "at least 2"),
    ("ComRoPE", {"grid": ()}, f"{SOME} 1, or None"),
    ("ComRoPE", {"start": "rope"}, '"normal" or "spectrum"'),
    ("ComRoPE", {"grid": (2, 2), "start": "spectrum"}, 'None with start="spectrum"'),
    ("ComRoPE", {"block_size": 3, "start": "spectrum"}, 'even with start="spectrum"'),
    ("Combine", {"encodings": ()}, "a tuple of one or more encodings"),
    ("Combine", {"encodings": "rope"}, "a tuple of one or more encodings"),
    ("FIRE", {"hidden_layers": 0}, "at least 1"),
    ("FIRE", {"hidden_width": 0}, "at least 1"),
    ("FIRE", {"initial_c": 0.0}, "above 0"),
    ("FIRE", {"initial_threshold": -1.0}, "above 0"),
    ("FIRE", {"normaliser": "key"}, '"query" or "larger"'),
    ("Forgetting", {"gate": "open"}, '"full", "bias_only" or "fixed"'),
    ("Forgetting", {"decay_times": (0.0, 1.0)}, "a tuple of 2 finite numbers, each above 0"),
    ("Forgetting", {"decay_times": (3.0, 1.0)}, "(shortest, longest), not falling"),
    ("HeadScale", {"lower_bound": 0.0}, "above 0"),
    ("HeadScale", {"initial": 0.9}, "at least lower_bound = 1.0"),
    ("Huang", {"method": 5}, "1, 2, 3 or 4"),
    ("Huang", {"max_distance": 0}, "at least 1"),
    ("Interpolated", {"trained_length": 0}, "at least 1"),
    ("Interpolated", {"target_length": 2047}, "at least trained_length = 2048"),
    ("KERPLE", {"kind": "exp"}, '"log" or "power"'),
    ("KERPLE", {"positivity": "exp"}, '"clamp" or "softplus"'),
    ("Fourier", {"features": 7}, "at least 2 and even"),
    ("Fourier", {"features": 0}, "at least 2 and even"),
    ("Fourier", {"hidden": 0}, "at least 1"),
    ("Fourier", {"gamma": 0.0}, "above 0"),
    ("Fourier", {"length": -1.0}, "above 0"),
    ("Fourier", {"grid": (3, 0)}, f"{SOME} 1, or None"),
    ("Fourier", {"groups": 2}, "a divisor of the number of coordinates, 1"),
    (
        "Fourier",
        {"groups": 3, "grid": (2, 2)},
        "a divisor of the number of coordinates, 2",
    ),
    ("Learned", {"max_length": 0}, "at least 1"),
    ("Learned", {"interpolate_to": 1024}, "above max_length = 1024, or None"),
    ("LogLength", {"trained_length": 1}, "at least 2"),
    ("LogLength", {"minimum": -1.0}, "at least 0"),
    ("MsPoE", {"min_ratio": 0.9}, "at least 1"),
    ("MsPoE", {"max_ratio": 1.1}, "at least min_ratio = 1.2"),
    ("MsPoE", {"order": (0, 2)}, "0, 1, ... in any order, or None"),
    ("MsPoE", {"order": (1, 1)}, "0, 1, ... in any order, or None"),
    ("MsPoE", {"skip_layers": -1}, "at least 0"),
    ("PEG", {"kernel_size": 0}, "at least 1"),
    ("PEG", {"kernel_size": 4, "grid": (2, 2)}, "odd on a grid"),
    ("PEG", {"block": -1}, "at least 0, or None"),
    ("PEG", {"grid": (3,)}, "a tuple of 2 integers, each at least 1, or None"),
    ("PRoPE", {"fraction": -0.1}, "from 0 to 1"),
    ("PRoPE", {"fraction": 1.1}, "from 0 to 1"),
    ("PRoPE", {"pairs": "high"}, '"fast" or "slow"'),
    ("PoSE", {"target_length": 0}, "at least 1"),
    ("Randomized", {"max_length": 0}, "at least 1"),
    ("Randomized", {"draws": 0}, "at least 1"),
    ("Randomized", {"draw": 1}, "from 0 to 0"),
    ("Randomized", {"evaluation": "none"}, '"random", "spread" or "plain"'),
    ("Randomized", {"evaluation_length": 0}, "at least 1, or None"),
    ("Randomized", {"evaluation_length": 9, "max_length": 8}, "at most max_length = 8, or None"),
    ("RoPE", {"fraction": 0.0}, "above 0 and at most 1"),
    ("RoPE", {"fraction": 1.5}, "above 0 and at most 1"),
    ("RoPE", {"scaling": 4.0}, "an instance of Scaling, or None"),
    ("Sandwich", {"width": 7}, "at least 2 and even"),
    ("SelfExtend", {"group": 0}, "at least 1"),
    ("SelfExtend", {"window": 0}, "at least 1"),
    ("SelfExtend", {"window": 1020}, "a multiple of group = 8"),
    ("SelfExtend", {"fraction": 0.0}, "above 0 and at most 1"),
    ("Relative", {"num_positions": 0}, "at least 1"),
    ("Relative", {"strict": 1}, "True or False"),
    ("Shaw", {"max_distance": 0}, "at least 1"),
    ("Sinusoidal", {"scale": 0.0}, "above 0, or None"),
    ("StickBreaking", {"attend_current": "yes"}, "True or False"),
    ("T5", {"num_buckets": 1}, "at least 2"),
    ("T5", {"num_buckets": 2, "bidirectional": True}, "at least 4 and even"),
    ("T5", {"num_buckets": 9, "bidirectional": True}, "at least 4 and even"),
    ("T5", {"max_distance": 16}, "above 16, the distances with a bucket of their own"),
    (
        "T5",
        {"max_distance": 8, "bidirectional": True},
        "above 8, the distances with a bucket of their own",
    ),
    ("TAPE", {"size": 0}, "at least 1"),
    ("TAPE", {"max_shift": -1}, "at least 0"),
    ("Temperature", {"temperature": 0.0}, "above 0"),
    ("TransformerXL", {"width": 5}, "at least 2 and even, or None"),
    ("XPos", {"scale_base": 0.0}, "above 0"),
]


@pytest.mark.parametrize(("name", "settings", "wanted"), TABLE)
def test_what_is_refused(name, settings, wanted):
    with pytest.raises(ValueError) as error:
        getattr(encodings, name)(**settings)
    field, value = next(iter(settings.items()))
    assert str(error.value) == f"{name} {field} is {value!r}; it must be {wanted}."


@pytest.mark.parametrize("part", [None, "rope"])
def test_parts_of_a_combination(part):
    with pytest.raises(ValueError) as error:
        encodings.Combine((encodings.RoPE(), part))
    wanted = "it must be an instance of PositionEncoding."
    assert str(error.value) == f"Combine encodings[1] is {part!r}; {wanted}"


def test_every_encoding_is_in_the_table():
    assert {name for name, *_ in TABLE} == {cls.__name__ for cls in CLASSES}
