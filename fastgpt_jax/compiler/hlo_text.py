"""Reads the text of an HLO module (`compiled.as_text()`) into computations of instructions.

Knows the grammar of that text and no meaning of any operation; imports no JAX. The one idea: all that instructions hold
beside their operands are attributes `key=value` with balanced brackets, so that what a later version adds is read too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastgpt_jax.errors import UserError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_BITS_IN_NAME = re.compile(r"^[a-z]+(\d+)")
_DELIMITERS = re.compile(r'["(){}\[\],]')
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]+\w*)\[([^\]]*)\]")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([^\s(]+)\s*\(.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?(\S+)\s+=\s+(.*)$")


@dataclass(frozen=True)
class Array:
    """An array as HLO names its dtype; a bounded dimension counts its bound."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes; numbers smaller than a byte are packed."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = _BITS_IN_NAME.match(self.dtype)
            bits = int(found[1]) if found else 8
        return (self.size * bits + 7) // 8


Type = Array | tuple["Type", ...]


def arrays(of: Type) -> Iterator[Array]:
    """The arrays of a type, those of tuples one after the other."""
    if isinstance(of, Array):
        yield of
    else:
        for part in of:
            yield from arrays(part)


def nbytes(of: Type) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for array in arrays(of))


def size(of: Type) -> int:
    """Elements of all arrays."""
    return sum(array.size for array in arrays(of))


@dataclass(frozen=True, eq=False)
class Instruction:
    """An instruction.

    Attributes:
      operands: Names of instructions of the same computation.
      literal: What stands between the brackets of a `constant` or `parameter`.
      attributes: As they are written.
    """

    name: str
    opcode: str
    type: Type
    operands: tuple[str, ...]
    literal: str
    attributes: Mapping[str, str]

    def called(self, key: str) -> tuple[str, ...]:
        """Names of the computations that an attribute lists."""
        text = self.attributes.get(key, "").strip("{} ")
        return tuple(name.strip().lstrip("%") for name in text.split(",") if name.strip())

    def numbers(self, key: str) -> tuple[int, ...]:
        """The whole numbers of an attribute such as `dimensions={0,2}`."""
        return tuple(map(int, re.findall(r"\d+", self.attributes.get(key, ""))))

    @property
    def array(self) -> Array:
        """The only array of the result, or the first."""
        return next(arrays(self.type))


@dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in order, by name; the last word has `root`."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Those that an instruction reads, in order."""
        return [self.instructions[name] for name in instruction.operands]

    @property
    def parameters(self) -> list[Instruction]:
        """In the order in which a caller gives them."""
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return sorted(found, key=lambda x: int(x.literal))


@dataclass(frozen=True, eq=False)
class Module:
    """A module: its computations by name, and the one that runs."""

    computations: Mapping[str, Computation]
    entry: Computation


def parse_module(text: str) -> Module:
    """Reads a module.

    Raises:
      UserError: It is no HLO text, or has a line that is none of an instruction.
    """
    computations: dict[str, Computation] = {}
    entry: str | None = None
    name: str | None = None
    found: dict[str, Instruction] = {}
    root: Instruction | None = None
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header is not None and not line.startswith("HloModule"):
                name, found, root = header[2], {}, None
                entry = name if header[1] else entry
        elif line.startswith("}"):
            last = root or next(reversed(found.values()))
            computations[name], name = Computation(name, found, last), None
        elif line.strip():
            instruction, is_root = _parse_instruction(line)
            found[instruction.name] = instruction
            root = instruction if is_root else root
    if entry is None or name is not None:
        raise UserError(f"this is no whole HLO module, which has an ENTRY computation: {text[:60]!r}")
    return Module(computations, computations[entry])


def _parse_instruction(line: str) -> tuple[Instruction, bool]:
    found = _INSTRUCTION.match(_COMMENT.sub("", line) if "/*" in line else line)
    if found is None:
        raise UserError(f"this line of an HLO module cannot be read: {line.strip()[:120]}")
    text = found[3]
    end = _end_of_type(text)
    opcode, _, rest = text[end:].lstrip().partition("(")
    parts = _split("(" + rest)
    inside, attributes = parts[0].strip()[1:-1], {}
    for part in parts[1:]:
        key, has_value, value = part.partition("=")
        if has_value:
            attributes[key.strip()] = value.strip()
    is_leaf = opcode in ("constant", "parameter", "iota")
    operands = () if is_leaf else tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    made = Instruction(
        found[2], opcode, _parse_type(text[:end]), operands, inside.strip() if is_leaf else "", attributes
    )
    return made, found[1] is not None


def _end_of_type(text: str) -> int:
    """Where the type at the beginning of `text` ends: at a blank outside all brackets."""
    depth = 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == " " and depth == 0:
            return i
    return len(text)


def _parse_type(text: str) -> Type:
    text = text.strip()
    if text.startswith("("):
        return tuple(_parse_type(part) for part in _split(text[1:-1]) if part.strip())
    found = _ARRAY.match(text)
    if found is None:
        raise UserError(f"this type of an HLO module cannot be read: {text[:120]}")
    return Array(found[1], tuple(int(n.strip().removeprefix("<=")) for n in found[2].split(",") if n.strip()))


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside all brackets and quotes."""
    parts, start, depth, quoted = [], 0, 0, False
    for found in _DELIMITERS.finditer(text):
        char, at = found[0], found.start()
        if char == '"':
            quoted = not quoted if text[at - 1 : at] != "\\" else quoted
        elif quoted:
            continue
        elif char in "({[":
            depth += 1
        elif char in ")}]":
            depth -= 1
        elif depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]
