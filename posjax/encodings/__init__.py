"""Position encodings, one file each, and their families; names lead to the classes themselves."""

import warnings

from posjax.encodings.abacus import Abacus as Abacus
from posjax.encodings.absolute_window import AbsoluteWindow as AbsoluteWindow
from posjax.encodings.alibi import ALiBi as ALiBi
from posjax.encodings.axial_rope import AxialRoPE as AxialRoPE
from posjax.encodings.base import PositionEncoding as PositionEncoding
from posjax.encodings.base import Side as Side
from posjax.encodings.base import Sizes as Sizes
from posjax.encodings.bipe import BiPE as BiPE
from posjax.encodings.combine import Combine as Combine
from posjax.encodings.complexformer import ComplexFormer as ComplexFormer
from posjax.encodings.comrope import ComRoPE as ComRoPE
from posjax.encodings.conflator import CONFLATOR as CONFLATOR
from posjax.encodings.cope import CoPE as CoPE
from posjax.encodings.distance import DistanceBias as DistanceBias
from posjax.encodings.fire import FIRE as FIRE
from posjax.encodings.forgetting import Forgetting as Forgetting
from posjax.encodings.fourier import Fourier as Fourier
from posjax.encodings.head_scale import HeadScale as HeadScale
from posjax.encodings.huang import Huang as Huang
from posjax.encodings.interpolated import Interpolated as Interpolated
from posjax.encodings.kerple import KERPLE as KERPLE
from posjax.encodings.learned import Learned as Learned
from posjax.encodings.log_length import LogLength as LogLength
from posjax.encodings.ms_poe import MsPoE as MsPoE
from posjax.encodings.p_rope import PRoPE as PRoPE
from posjax.encodings.peg import PEG as PEG
from posjax.encodings.pose import PoSE as PoSE
from posjax.encodings.randomized import Randomized as Randomized
from posjax.encodings.registry import create as create
from posjax.encodings.registry import names as names
from posjax.encodings.relative import Relative as Relative
from posjax.encodings.rope import RoPE as RoPE
from posjax.encodings.rotary import Rotary as Rotary
from posjax.encodings.sandwich import Sandwich as Sandwich
from posjax.encodings.self_extend import SelfExtend as SelfExtend
from posjax.encodings.shaw import Shaw as Shaw
from posjax.encodings.sinusoidal import Sinusoidal as Sinusoidal
from posjax.encodings.stick_breaking import StickBreaking as StickBreaking
from posjax.encodings.stream import StreamEncoding as StreamEncoding
from posjax.encodings.t5 import T5 as T5
from posjax.encodings.tape import TAPE as TAPE
from posjax.encodings.temperature import Temperature as Temperature
from posjax.encodings.transformer_xl import TransformerXL as TransformerXL
from posjax.encodings.xpos import XPos as XPos

# Classes that were renamed after their files; the old names go with the next version.
_OLD_NAMES = {
    "CMHA": "ComplexFormer",
    "LearnableFourier": "Fourier",
    "LearnedAbsolute": "Learned",
    "T5Bias": "T5",
}


def __getattr__(name: str) -> type[PositionEncoding]:
    """Renamed classes under their old names."""
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _OLD_NAMES[name]
    warnings.warn(f"{name} is now called {new}.", DeprecationWarning, stacklevel=2)
    return globals()[new]
