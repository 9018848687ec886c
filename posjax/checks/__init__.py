"""Checks of arguments and settings, whose messages have one form.

    X is V; it must be W.

Every function raises ValueError that names the argument or setting and its value, for a wrong type,
too. Those that check one value return it. `fields` checks all settings of a dataclass (a Linen
module is one) by their annotations, with `Limits` for those that have a range:

    def __post_init__(self):
        checks.fields(self, base=above(1), width=at_least(1))
"""

from posjax.checks.annotations import check_of as check_of
from posjax.checks.annotations import fields as fields
from posjax.checks.arrays import dtype as dtype
from posjax.checks.arrays import key as key
from posjax.checks.arrays import rows as rows
from posjax.checks.arrays import shape as shape
from posjax.checks.calls import annotated as annotated
from posjax.checks.calls import arguments as arguments
from posjax.checks.limits import LARGEST as LARGEST
from posjax.checks.limits import LONGEST as LONGEST
from posjax.checks.limits import Limits as Limits
from posjax.checks.limits import above as above
from posjax.checks.limits import at_least as at_least
from posjax.checks.limits import between as between
from posjax.checks.limits import size as size
from posjax.checks.values import choice as choice
from posjax.checks.values import flag as flag
from posjax.checks.values import instance as instance
from posjax.checks.values import integer as integer
from posjax.checks.values import integers as integers
from posjax.checks.values import number as number
from posjax.checks.values import numbers_of as numbers_of
from posjax.checks.values import require as require
from posjax.checks.values import text as text
