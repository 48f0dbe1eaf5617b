#!/usr/bin/env python3
"""Compares `uext bench-dev` with fio: the same engine, operation, size and depth, in turn.

    engines.py --uext target/release/uext [--file F] [--rounds N] [--seconds S]

Shown are medians and the median of the rounds' ratios (above 1: uext is faster), and
what merging in a plug gains on sequential 4 KiB bios.
"""
import argparse
import json
import os
import statistics
import subprocess
import tempfile

#: bench-dev's engine: fio's arguments for it.  The sync engine is threads, fio's jobs.
FIO = {
    "sync": "--ioengine=psync --numjobs={depth}",
    "aio": "--ioengine=libaio --iodepth={depth}",
    "uring": "--ioengine=io_uring --iodepth={depth}",
}
CELLS = [(rw, size, depth) for rw in ("randread", "read", "randwrite")
         for size, depth in (("4k", 1), ("4k", 8), ("4k", 32), ("128k", 8))]


def fio(path, engine, rw, size, depth, seconds):
    arguments = FIO[engine].format(depth=depth).split()
    command = ["fio", "--name=f", f"--filename={path}", f"--rw={rw}", f"--bs={size}", "--direct=1",
               f"--runtime={round(seconds * 1000)}ms", "--time_based", "--ramp_time=100ms", "--group_reporting",
               "--output-format=json", "--norandommap", "--randrepeat=0", "--thread", *arguments]
    text = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    job = json.loads(text[text.index("{"):])["jobs"][0]
    return job["write" if "write" in rw else "read"]["iops"]


def bench_dev(uext, path, engine, rw, size, depth, seconds, plug="off"):
    command = [uext, "bench-dev", "--engine", engine, "--rw", rw, "--block-size", size, "--depth",
               str(depth), "--plug", plug, "--seconds", str(seconds), "--rounds", "1", "--destroy",
               "--json", "-", path]
    text = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    return json.loads(text)["cells"][0]["iops"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uext", default="uext")
    parser.add_argument("--file", help="a file or device whose contents may go")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1)
    arguments = parser.parse_args()
    path, seconds = arguments.file, arguments.seconds
    made = None
    if not path:
        made = tempfile.NamedTemporaryFile(prefix="uext-engines-", dir="/var/tmp")
        path = made.name
        block = os.urandom(1 << 20)
        for _ in range(1024):
            made.write(block)
        made.flush()
        os.fsync(made.fileno())
    print(f"load {os.getloadavg()[0]:.1f}; {arguments.rounds} rounds of {seconds} s")
    print("| operation | bytes | depth | engine | uext | fio | uext/fio |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for rw, size, depth in CELLS:
        for engine in FIO:
            if engine == "sync" and depth > 8:
                continue
            pairs = []
            for _ in range(arguments.rounds):
                pairs.append((bench_dev(arguments.uext, path, engine, rw, size, depth, seconds),
                              fio(path, engine, rw, size, depth, seconds)))
            ours, theirs = (statistics.median(side) for side in zip(*pairs))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"| {rw} | {size} | {depth} | {engine} | {ours:,.0f} | {theirs:,.0f} "
                  f"| {ratio:.2f} |", flush=True)
    print("\n| sequential 4 KiB, depth 32 | engine | plain | plugged | gain |\n|---|---|---:|---:|---:|")
    for rw in ("read", "write"):
        for engine in FIO:
            pairs = []
            for _ in range(arguments.rounds):
                pairs.append([bench_dev(arguments.uext, path, engine, rw, "4k", 32, seconds, plug)
                              for plug in ("off", "on")])
            plain, plugged = (statistics.median(side) for side in zip(*pairs))
            gain = statistics.median(b / a for a, b in pairs)
            print(f"| {rw} | {engine} | {plain:,.0f} | {plugged:,.0f} | {gain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
