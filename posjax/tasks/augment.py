"""Changes of arithmetic text that teach a model not to rely on absolute places.

Pure functions of text and a `numpy.random.Generator`, for tasks and for files of text; the inverse
of each stands beside it.

References:
    Shen, Bubeck, Eldan, Lee, Li, Zhang, Positional Description Matters for Transformers
    Arithmetic, arXiv:2311.14737.

>>> generator = np.random.default_rng(0)
>>> remove_spaces(random_spaces("12+34=46", generator, 0.5))
'12+34=46'
"""

import re
import string
from collections.abc import Sequence

import numpy as np

from posjax import checks

__all__ = [
    "index_hints",
    "padded",
    "padded_product",
    "random_spaces",
    "read_product",
    "remove_hints",
    "remove_spaces",
]

# Python turns no longer text into an integer, unless told to.
_DIGITS = 4300


@checks.arguments(probability=checks.between(0, 1))
def random_spaces(text: str, generator: np.random.Generator, probability: float) -> str:
    """Puts spaces before characters at random.

    Before each character comes a space with the given probability, then another one with a tenth of
    it, and so on until one does not come.

    Raises:
        ValueError: a probability outside 0 ... 1.

    >>> random_spaces("1+2", np.random.default_rng(0), 0.0)
    '1+2'
    """
    parts = []
    for character in text:
        chance = probability
        while generator.random() < chance:
            parts.append(" ")
            chance /= 10
        parts.append(character)
    return "".join(parts)


@checks.arguments()
def remove_spaces(text: str) -> str:
    """The text without spaces.

    >>> remove_spaces("1 2  +3")
    '12+3'
    """
    return text.replace(" ", "")


@checks.arguments()
def index_hints(
    numbers: Sequence[str],
    generator: np.random.Generator,
    alphabet: str = string.ascii_lowercase,
) -> list[str]:
    """Puts a letter before each digit that tells its place, the same in all numbers.

    Letters follow each other in the alphabet, with "a" after "z", from a random one on. Places are
    counted from the front: give numbers of one width, or with their lowest digits first.

    Raises:
        ValueError: a number with a character that is no digit, letters that come twice or are
            digits, or more digits than letters.

    >>> index_hints(["531", "20"], np.random.default_rng(1))
    ['n5o3p1', 'n2o0']
    """
    _require_alphabet(alphabet)
    for number in numbers:
        is_number = number.isascii() and number.isdigit()
        checks.require("one of numbers", number, is_number, "digits only")
        wanted = f"at most {len(alphabet)} digits, the letters of alphabet"
        checks.require("one of numbers", number, len(number) <= len(alphabet), wanted)
    start = int(generator.random() * len(alphabet))
    letters = alphabet[start:] + alphabet[:start]
    return ["".join(map("".join, zip(letters, number, strict=False))) for number in numbers]


@checks.arguments()
def remove_hints(text: str, alphabet: str = string.ascii_lowercase) -> str:
    """The text without the letters of the alphabet.

    >>> remove_hints("n5o3+n2=")
    '53+2='
    """
    _require_alphabet(alphabet)
    return text.translate(dict.fromkeys(map(ord, alphabet)))


@checks.arguments(width=checks.between(1, _DIGITS))
def padded(number: int, width: int) -> str:
    """The digits of a number with zeros before them.

    Raises:
        ValueError: a negative number, or one with more digits than `width`.

    >>> padded(42, 5)
    '00042'
    """
    checks.integer("number", number, low=0, high=10**width - 1)
    return f"{number:0{width}d}"


@checks.arguments(width=checks.between(1, _DIGITS // 2))
def padded_product(first: int, second: int, width: int) -> tuple[str, str]:
    """A multiplication with padded factors, and its padded product with the lowest digit first.

    The paper trains with a width of 15.

    Raises:
        ValueError: a factor that is negative or has more digits than `width`.

    >>> padded_product(12, 34, 3)
    ('012*034=', '804000')
    """
    for name, factor in (("first", first), ("second", second)):
        checks.integer(name, factor, low=0, high=10**width - 1)
    question = f"{padded(first, width)}*{padded(second, width)}="
    return question, padded(first * second, 2 * width)[::-1]


@checks.arguments()
def read_product(question: str, answer: str) -> tuple[int, int, int]:
    """The factors and the product that `padded_product` wrote.

    Raises:
        ValueError: other texts.

    >>> read_product("012*034=", "804000")
    (12, 34, 408)
    """
    found = re.fullmatch(r"([0-9]+)\*([0-9]+)=?", question)
    checks.require("question", question, found is not None, "two numbers with * between")
    is_number = re.fullmatch("[0-9]+", answer) is not None
    checks.require("answer", answer, is_number, "the digits of a number")
    return int(found[1]), int(found[2]), int(answer[::-1])


def _require_alphabet(alphabet: str) -> None:
    differ = len(set(alphabet)) == len(alphabet) > 0
    wanted = "different letters, none of them a digit"
    checks.require("alphabet", alphabet, differ and not any(map(str.isdigit, alphabet)), wanted)
