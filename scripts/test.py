"""Run pytest in the project's own environment, which is made first if it is missing: python scripts/test.py [options].

The tests run in up to four processes, each on one thread; `-n 0` among the options runs them in one (for --pdb).
"""

import sys

import environment


def main() -> int:
    python = environment.ready(extra="dev")
    parallel = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    return environment.run([python, "-m", "pytest", *parallel, *sys.argv[1:]], folder=environment.ROOT)


if __name__ == "__main__":
    environment.leave(main)
