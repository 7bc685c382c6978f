"""One side of one work, in this process: `python -m benchmarks.child WORK SIDE FOLDER`; see `pairs`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from benchmarks.pairs import Done, Setting, same_environment, tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("side", help="prepare, or the name of a side")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--root")
    options = parser.parse_args()
    from isoform import machine

    same_environment(machine.cores())
    warnings.simplefilter("ignore")
    from benchmarks.works import ALL

    setting, work = Setting(options.quick, options.root), ALL[options.work]
    output, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    if options.side == "prepare":
        work.prepare(options.folder, setting)
        done = Done(1, 1.0)
    else:
        done = work.sides[options.side](options.folder, setting)
    sys.stdout = output
    tell(done)


if __name__ == "__main__":
    main()
