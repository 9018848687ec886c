"""Loops in the machine code of GPU kernels, as nvdisasm prints it for Mosaic GPU."""

import collections
import dataclasses
import re

__all__ = ["Loop", "kernels", "loops", "registers"]

# An instruction: its address, perhaps a predicate, its name, operands.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
_LABEL = re.compile(r"^\s*\.?(L_x_\d+):")
_SECTION = re.compile(r"^\.text\.(\w+):", re.MULTILINE)
_MATRIX = "HGMMA"
# Of the smallest tile.
_KEYS = 16


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
        """Words that went to memory because registers were too few, and those that came back."""
        return self.count["LDL"] + self.count["STL"]

    @property
    def counts(self) -> bool:
        """Whether there are gates, which take a reciprocal for each pair."""
        return self.count["MUFU.RCP"] >= _KEYS


def kernels(text: str) -> dict[str, str]:
    """The code of each kernel, by name."""
    parts = _SECTION.split(text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def registers(text: str) -> int:
    """The highest register that the code names."""
    return max(map(int, re.findall(r"\bR(\d+)\b", text)))


def loops(text: str) -> list[Loop]:
    """The innermost loops with matrix products, in the order of the code."""
    instructions, labels = _parsed(text)
    spans = set()
    for address, name, operands in instructions:
        target = _TARGET.search(operands) if name.startswith("BRA") else None
        if target and labels[target.group(1)] < address:
            spans.add((labels[target.group(1)], address))
    bodies = {}
    for start, end in spans:
        names = [name for address, name, _ in instructions if start <= address <= end]
        # A loop that sleeps is a wait; it comes after the rest of the code and jumps back to it.
        waits = any(name.startswith("NANOSLEEP") for name in names)
        if not waits and any(name.startswith(_MATRIX) for name in names):
            bodies[start, end] = names
    return [Loop(_counted(bodies[span])) for span in sorted(bodies) if _is_innermost(span, bodies)]


def _parsed(text: str) -> tuple[list[tuple[int, str, str]], dict[str, int]]:
    """Instructions (address, name, operands), and the addresses of labels."""
    instructions, labels, waiting = [], {}, []
    for line in text.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.search(line)
        if label:
            waiting.append(label.group(1))
        if found:
            address = int(found.group(1), 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            instructions.append((address, found.group(2), found.group(3)))
    return instructions, labels


def _is_innermost(span: tuple[int, int], spans) -> bool:
    start, end = span
    return not any(span != (a, b) and start <= a and b <= end for a, b in spans)


def _counted(names: list[str]) -> collections.Counter:
    """By name without its variants; of special functions with the first one."""
    parts = (name.split(".") for name in names)
    return collections.Counter(".".join(p[: 2 if p[0] == "MUFU" else 1]) for p in parts)
