"""Runs commands in turn, A B A B …, and compares what the operating system says of each."""

import os
import statistics
import subprocess
import sys
import time


class Sample:
    """One finished process tree: wall and CPU seconds, peak memory of its largest process in KiB."""

    def __init__(self, wall, cpu, rss, code):
        self.wall, self.cpu, self.rss, self.code = wall, cpu, rss, code


def run(command, env=None, stdin=None, quiet=True):
    """Runs one command to its end."""
    out = subprocess.DEVNULL if quiet else None
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdin=stdin or subprocess.DEVNULL, stdout=out, stderr=out)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, process.returncode)


def alternate(contenders, runs, warmup=1, before=None):
    """`contenders` is {name: command or callable}; returns {name: [Sample]}."""
    samples = {name: [] for name in contenders}
    for turn in range(runs + warmup):
        for name, command in contenders.items():
            if before:
                before(name)
            sample = command() if callable(command) else run(command)
            if sample.code != 0:
                sys.exit(f"{name}: exit code {sample.code} in a benchmark; nothing is compared")
            if turn >= warmup:
                samples[name].append(sample)
    return samples


def table(title, samples, ours, columns=("wall", "cpu", "rss"), goals=None):
    """Prints medians and the ratios of ours to each other contender (pair by pair, median)."""
    goals = goals or {}
    print(f"\n### {title}\n")
    head = {"wall": ("wall min ms", "wall median ms"), "cpu": ("CPU median ms",), "rss": ("peak MiB",)}
    cells = ["contender"]
    for column in columns:
        cells += head[column]
    cells += [f"{column} ratio" for column in columns]
    print("| " + " | ".join(cells) + " |")
    print("|" + " --- |" * len(cells))
    mine = samples[ours]
    result = {}
    for name, theirs in samples.items():
        row = [name]
        for column in columns:
            values = [getattr(s, column) for s in theirs]
            if column == "rss":
                row.append(f"{statistics.median(values) / 1024:.1f}")
            else:
                if column == "wall":
                    row.append(f"{min(values) * 1000:.1f}")
                row.append(f"{statistics.median(values) * 1000:.1f}")
        for column in columns:
            ratios = [getattr(a, column) / max(getattr(b, column), 1e-9) for a, b in zip(mine, theirs)]
            ratio = statistics.median(ratios)
            result[(name, column)] = ratio
            goal = goals.get((name, column))
            row.append("1" if name == ours else f"{ratio:.2f}" + (f" (goal {goal})" if goal else ""))
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()
    return result
