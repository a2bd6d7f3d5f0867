"""Run `dydit demo` in the project's own environment, which is made first if it is missing: python scripts/demo.py [options]."""

import sys

import environment


def main() -> int:
    python = environment.ready()
    return environment.run([python, "-m", "dydit_cli", "demo", *sys.argv[1:]])


if __name__ == "__main__":
    environment.leave(main)
