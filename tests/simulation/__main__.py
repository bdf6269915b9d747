"""`python -m tests.simulation --seeds 1000`, or `--seed 7` to read one story."""

import argparse
import sys
import time
from collections.abc import Sequence

from tests.simulation.profiles import ALL, PROFILES, profile_of
from tests.simulation.run import Run, outcome, outcomes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="one seed, with its whole story")
    parser.add_argument("--profile", choices=[ALL, *PROFILES], default=ALL)
    given = parser.parse_args(argv)

    def run(seed: int) -> Run:
        return seed, profile_of(seed) if given.profile == ALL else given.profile

    if given.seed is not None:
        told = outcome(run(given.seed))
        print(told.story)
        sys.exit(told.error is not None)
    began, issued, broken = time.perf_counter(), 0, 0
    for told in outcomes([run(seed) for seed in range(given.first, given.first + given.seeds)]):
        issued += told.issued
        if told.error is not None:
            broken += 1
            print(told.story, flush=True)
    took = time.perf_counter() - began
    print(f"{given.seeds} seeds, {broken} broken; {issued} ids; {given.seeds / took:.1f} seeds a second")
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
