"""Loops in the machine code of GPU kernels, from what Mosaic GPU leaves in MOSAIC_GPU_DUMP_TO."""

import collections
import dataclasses
import re
from pathlib import Path

__all__ = ["Loop", "loops", "registers"]

# An instruction: its address, perhaps a predicate, and its name.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_TARGET = re.compile(r"(?:`\(\.(L_x_\d+)\)|0x([0-9a-f]+))")
_LABEL = re.compile(r"^\s*\.?(L_x_\d+):", re.MULTILINE)
# How often these instructions of a matrix product appear where a tile is worked on.
_MATRIX = "HGMMA"


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of an innermost loop with matrix products."""

    count: collections.Counter

    @property
    def instructions(self) -> int:
        """All of them."""
        return self.count.total()

    @property
    def spills(self) -> int:
        """Words that went to memory because registers were too few, and came back."""
        return self.count["LDL"] + self.count["STL"]

    @property
    def kind(self) -> str:
        """careful, band or plain: by what only they do."""
        if not self.count["MUFU.RCP"]:
            return "plain"
        return "careful" if self.count["LDG"] else "band"


def _parsed(text: str) -> tuple[list[tuple[int, str, str]], dict[str, int]]:
    """Instructions (address, name, operands), and the addresses of labels."""
    instructions, labels, waiting = [], {}, []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            waiting.append(label.group(1))
        found = _INSTRUCTION.search(line)
        if found:
            address = int(found.group(1), 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            instructions.append((address, found.group(3), found.group(4)))
    return instructions, labels


def loops(sass: Path) -> list[Loop]:
    """The innermost loops with matrix products, in the order of the code."""
    instructions, labels = _parsed(sass.read_text())
    spans = []
    for address, name, operands in instructions:
        if not name.startswith("BRA"):
            continue
        target = _TARGET.search(operands)
        start = labels.get(target.group(1)) if target and target.group(1) else None
        if target and target.group(2):
            start = int(target.group(2), 16)
        if start is not None and start < address:
            spans.append((start, address))
    found = []
    for start, end in sorted(set(spans)):
        body = [name for address, name, _ in instructions if start <= address <= end]
        # What sleeps is a wait, which stands behind the rest of the code and jumps back to it.
        waits = any(name.startswith("NANOSLEEP") for name in body)
        if any(name.startswith(_MATRIX) for name in body) and not waits:
            found.append((start, end, body))
    innermost = [
        (start, end, body)
        for start, end, body in found
        if not any((start, end) != (a, b) and start <= a and b <= end for a, b, _ in found)
    ]
    return [Loop(_counted(body)) for _, _, body in innermost]


def _counted(names: list[str]) -> collections.Counter:
    count = collections.Counter(name.split(".")[0] for name in names)
    special = collections.Counter(".".join(n.split(".")[:2]) for n in names if n.startswith("MUFU"))
    del count["MUFU"]
    return count + special


def registers(sass: Path) -> int:
    """The highest register that the code names."""
    return max(map(int, re.findall(r"\bR(\d+)\b", sass.read_text())))
