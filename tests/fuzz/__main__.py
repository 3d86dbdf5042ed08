"""Run random cases: ``python -m tests.fuzz --seed 1000 --count 500``; exit with 1 if one fails."""

import argparse
import os
import warnings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each next case has the next seed")
    parser.add_argument("--count", type=int, help="cases to run (1 without --seconds)")
    parser.add_argument("--seconds", type=float, help="after which no more cases begin")
    parser.add_argument(
        "--kernel", choices=("torch", "c"), help="the kernel to test, by default the one polyak chooses"
    )
    parser.add_argument("--loop", help="the only loop to run, such as 'hooked' or 'Lightning'")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--case", help="instead of a seed, a case in the form that this command prints")
    parser.add_argument("--no-shrink", dest="shrink", action="store_false", help="do not make failed cases smaller")
    asked = parser.parse_args()
    if asked.kernel:
        os.environ["POLYAK_KERNEL"] = asked.kernel  # read when polyak is imported
    warnings.simplefilter("ignore")
    from .run import run

    return run(
        seed=asked.seed,
        count=asked.count if asked.count or asked.seconds else 1,
        seconds=asked.seconds,
        loop=asked.loop,
        processes=asked.processes,
        case=asked.case,
        shrink=asked.shrink,
    )


raise SystemExit(main())
