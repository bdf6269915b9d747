"""Make mongods a replica set: `python -m drsm_agent.store.initiate rs0 mongo-1:27017 mongo-2:27017 ...`.

For compose and the like, once at every start: a set that is one already is a success. Waits for the
members and for a primary. Exit codes: 0 it is whole; 1 not within the time, or it has other members.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from drsm_agent.store.replica_set import READY_SECONDS, ensure

ELECTION_TIMEOUT_MS = 5000
"""Half of MongoDB's default, as it bounds how long nothing is granted after the primary was lost; a member
that is silent for so long within one site is gone."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make mongods a replica set, unless they are one.")
    parser.add_argument("name", help="of the set, as given to mongod by --replSet")
    parser.add_argument("hosts", nargs="+", metavar="host:port", help="as members and clients reach it")
    parser.add_argument("--timeout", type=float, default=READY_SECONDS, help="seconds (%(default)g)")
    given = parser.parse_args(argv)
    try:
        primary = asyncio.run(ensure(given.hosts, given.name, ELECTION_TIMEOUT_MS, given.timeout))
    except (TimeoutError, ValueError) as error:
        sys.exit(f"initiate: {error}")
    print(f"{given.name} is a replica set of {', '.join(given.hosts)}; primary is {primary}")


if __name__ == "__main__":
    main()
