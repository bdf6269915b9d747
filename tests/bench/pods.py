"""Pods in one process: `python -m tests.bench.pods`. At `go` all start; they live until its input ends.

Says how long each took until it had joined with stock, and what this process used of the processors for it.
"""

import argparse
import asyncio
import time
from contextlib import AsyncExitStack

from drsm_sdk import Drsm, Pod
from tests.bench.children import say, told
from tests.bench.measure import seconds


async def run(arguments: argparse.Namespace) -> None:
    say("ready")
    await told()
    async with AsyncExitStack() as alive:

        async def start(number: int) -> None:
            pod = Pod(f"{arguments.name}-{number}", "10.0.0.1", "bench")
            connecting = Drsm.connect(arguments.nats, pod, prefix=arguments.prefix, timeout=arguments.timeout)
            drsm = await alive.enter_async_context(connecting)
            await drsm.join(arguments.pool)

        used = time.process_time()
        took = await asyncio.gather(*[seconds(start(number)) for number in range(arguments.count)])
        say({"took": took, "cpu": time.process_time() - used})
        await told()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--name", required=True, help="the pods are called <name>-0, <name>-1, ...")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a pod may take to start")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
