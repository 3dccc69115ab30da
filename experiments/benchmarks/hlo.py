"""The kernels of a compiled program, read from the text of its optimised HLO.

A kernel is an instruction of a computation that runs: fusions, library calls, copies and collectives, through calls
(which command buffers are) and loops, times their turns. What only names memory is none, and a loop's own test is not
counted. The compiler does not know the turns of a loop whose bounds are traced: `depth` counts those around a kernel,
so that in a training program 0 is once a call, 1 once an iteration, and 2 once an update.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
IN_PLACE = {"dynamic-update-slice", "scatter"}

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.-]+)")


class Instruction(NamedTuple):
    """One line: `type` is that of its result, `rest` all that follows the opcode."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def arrays(self) -> list[tuple[str, int]]:
        """(element type, elements) of each array of the result."""
        return [(kind, math.prod(int(n) for n in dims.split(",") if n)) for kind, dims in ARRAY.findall(self.type)]

    @property
    def called(self) -> str | None:
        """The computation that it calls, of a loop its body."""
        found = CALLED.search(self.rest)
        return found and found[1]


class Program(NamedTuple):
    """Computations by name, and which of them runs."""

    computations: dict[str, list[Instruction]]
    entry: str


class Kernel(NamedTuple):
    """An instruction that runs, how often where each loop of unknown length turns once, and how many of those are
    around it."""

    instruction: Instruction
    times: int
    depth: int


def parse(text: str) -> Program:
    """The program that `text` is, as `compiled.as_text()` gives it."""
    computations: dict[str, list[Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            inside = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif inside is not None and (found := INSTRUCTION.match(line)):
            inside.append(Instruction(*found.groups()))
    return Program(computations, entry)


def kernels(program: Program, name: str | None = None, times: int = 1, depth: int = 0) -> Iterator[Kernel]:
    """Every kernel of the computation `name`, by default the entry."""
    for instruction in program.computations[name or program.entry]:
        if instruction.opcode == "while":
            known = int(turns[1]) if (turns := TURNS.search(instruction.rest)) else 0
            yield from kernels(program, instruction.called, times * (known or 1), depth + (not known))
        elif instruction.opcode == "call":
            yield from kernels(program, instruction.called, times, depth)
        elif instruction.opcode == "conditional":
            raise ValueError(f"{instruction.name} is a conditional: which of its kernels run depends on the data")
        elif instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
            yield Kernel(instruction, times, depth)


def written_whole(program: Program, launched: Iterable[Kernel], fields: set[tuple[str, int]]) -> list[str]:
    """The kernels that make a whole array like one of `fields`, (element type, elements), where they could write a part
    of it in place."""

    def part(instruction: Instruction) -> bool:
        inside = [instruction, *program.computations.get(instruction.called or "", ())]
        copied = any(i.opcode == "copy" and fields & set(i.arrays) for i in inside)
        return not copied and any(i.opcode in IN_PLACE for i in inside)

    made = [kernel.instruction for kernel in launched if fields & set(kernel.instruction.arrays)]
    return [instruction.name for instruction in made if not part(instruction)]


def element_type(dtype: np.dtype) -> str:
    """What HLO calls a type of NumPy's: pred, u8, s32, f32."""
    return "pred" if dtype.kind == "b" else f"{dtype.kind.replace('i', 's')}{8 * dtype.itemsize}"
