"""Job classes on their way to job actors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import koan_ray as koan
from koan_ray.runtime.code import write

_READ = """
import sys
from koan_ray.runtime.code import read
definition = read(sys.stdin.buffer.read()).definition
print(definition.context_adapter.validate_json('{"n": 1}'))
"""


def test_a_dataclass_in_a_script_keeps_its_defaults_in_another_process():
    @dataclass
    class Order:
        n: int
        colour: str = "red"
        parts: list[int] = field(default_factory=list)

    class Ship(koan.Job[Order, int]):
        def execute(self, context, progress, cancellation) -> int:
            return context.n

    read = subprocess.run([sys.executable, "-c", _READ], input=write(Ship), capture_output=True, check=False)
    assert read.stdout.decode().strip().endswith("Order(n=1, colour='red', parts=[])"), read.stderr.decode()
