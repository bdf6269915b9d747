"""Real servers without Docker: a MongoDB replica set and a nats-server, for `dev`, `demo` and the tests.

`Stack` starts both. Each server can be stopped, killed, paused and restarted one by one, and whatever
becomes of the process that started them, none of them and no file of theirs outlives it.
"""

from drsm_agent.embedded.errors import BinaryBroken, BinaryMissing, EmbeddedError, PortTaken, ServerFailed
from drsm_agent.embedded.mongod import Mongod, ReplicaSet, start_replica_set, start_standalone
from drsm_agent.embedded.nats_server import NatsServer, start_nats_server
from drsm_agent.embedded.processes import Process
from drsm_agent.embedded.scratch import Scratch
from drsm_agent.embedded.stack import Stack

__all__ = [
    "BinaryBroken",
    "BinaryMissing",
    "EmbeddedError",
    "Mongod",
    "NatsServer",
    "PortTaken",
    "Process",
    "ReplicaSet",
    "Scratch",
    "ServerFailed",
    "Stack",
    "start_nats_server",
    "start_replica_set",
    "start_standalone",
]
