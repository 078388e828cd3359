"""What tests of jobs, stores and launchers need; no test framework is imported.

`engine` and `run`: the whole engine in one process, in virtual time. `ManualClock`, `VirtualLoop`: time. `SimLauncher`,
`Faults`: job actors that die when they should. `StoreContract`: the promises of a store, as tests to subclass.
"""

from koan_ray.testing.clock import ManualClock
from koan_ray.testing.contracts import StoreContract
from koan_ray.testing.engine import TestEngine, engine
from koan_ray.testing.loop import VirtualLoop, run
from koan_ray.testing.simulation import Faults, SimLauncher

__all__ = ["Faults", "ManualClock", "SimLauncher", "StoreContract", "TestEngine", "VirtualLoop", "engine", "run"]
