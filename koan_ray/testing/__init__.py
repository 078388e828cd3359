"""What tests of jobs, stores and launchers need; no test framework is imported.

`engine` and `run`: the whole engine in one process, in virtual time. `ManualClock`, `VirtualLoop`: time. `SimLauncher`,
`Faults`: job actors that die when they should. `MemoryDatabase`, `MemoryDocumentStore`, `StoreFaults`: a database that fails
when it should. `StoreContract`, `DocumentStoreContract`, `LauncherContract`: the promises of a store and of a launcher, as
tests to subclass; `Yard` is what the latter are tried out in.
"""

from koan_ray.testing.clock import ManualClock
from koan_ray.testing.contracts import DocumentStoreContract, LauncherContract, StoreContract
from koan_ray.testing.documents import MemoryDatabase, MemoryDocumentStore, StoreFaults
from koan_ray.testing.engine import TestEngine, engine
from koan_ray.testing.loop import VirtualLoop, run
from koan_ray.testing.simulation import Faults, SimLauncher
from koan_ray.testing.yard import Yard

__all__ = [
    "DocumentStoreContract", "Faults", "LauncherContract", "ManualClock", "MemoryDatabase", "MemoryDocumentStore",
    "SimLauncher", "StoreContract", "StoreFaults", "TestEngine", "VirtualLoop", "Yard", "engine", "run",
]  # fmt: skip
