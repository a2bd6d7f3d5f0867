"""Run a command and measure the largest memory that it owns, and the time, passed and of the processor.

    python scripts/measure_command.py --json measured.json -- dydit export --model converted --out exported

Memory is RssAnon of /proc/PID/status, of the command and the processes that it starts, added up. Pages of mapped files, which the
system drops when it needs room, are reported beside it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

INTERVAL_S = 0.05
FIELDS = ("RssAnon", "RssFile")


def family_of(pid: int) -> list[int]:
    """A process and all that came from it."""
    found = [pid]
    for one in found:
        try:
            children = Path(f"/proc/{one}/task/{one}/children").read_text(encoding="ascii").split()
        except OSError:
            continue
        found.extend(int(child) for child in children)
    return found


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by field, of a process and all that came from it."""
    total = dict.fromkeys(FIELDS, 0)
    for one in family_of(pid):
        try:
            lines = Path(f"/proc/{one}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name in total:
                total[name] += int(rest.split()[0]) * 1024
    return total


def main() -> int:
    """Run, sample, print; return what the command returned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    settings = parser.parse_args()
    command = settings.command[1:] if settings.command[:1] == ["--"] else settings.command
    if not command:
        parser.error("there is no command to run; write it after --")
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    largest = dict.fromkeys(FIELDS, 0)
    while process.poll() is None:
        for name, value in memory_of(process.pid).items():
            largest[name] = max(largest[name], value)
        time.sleep(INTERVAL_S)
    seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "command": command,
        "exit_code": process.returncode,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "rss_anon_peak_gb": largest["RssAnon"] / 1e9,
        "rss_file_peak_gb": largest["RssFile"] / 1e9,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(figures, indent=2))
    if settings.json:
        settings.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
