#!/usr/bin/env python3
"""Compares `uext bench-dev` with fio: the same engine, operation, size and depth, in turn.

    engines.py --uext target/release/uext [--path FILE|DEV ...] [--rounds N] [--seconds S]

Without --path a file of 1 GiB is made in --dir, and a loop device over it (as root).  What
is there is overwritten.  Shown are medians and the median of the rounds' ratios (above 1:
uext is faster), and what merging in a plug gains on sequential 4 KiB bios, with what fio gets
out of the disk with requests of the same size and number as merging makes, and with large ones,
neither of which it can pass.  The exit status is 1 when a
ratio is below --least or a gain below --least-gain; what is short is run more often first.

As root the CPUs are kept from halting meanwhile (/dev/cpu_dma_latency), for both alike: how
long an idle virtual CPU takes to wake up is the machine's, and differs from minute to minute.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile

#: bench-dev's engine: fio's arguments for it.  The sync engine is threads, fio's jobs.
FIO = {
    "sync": "--ioengine=pvsync2 --numjobs={depth}",
    "aio": "--ioengine=libaio --iodepth={depth}",
    "uring": "--ioengine=io_uring --iodepth={depth}",
}
CELLS = [(rw, size, depth) for rw in ("randread", "randwrite")
         for size, depth in (("4k", 1), ("4k", 8), ("4k", 32), ("128k", 8))]
#: The sync engine has so many threads.
SYNC_DEPTH = 8
BYTES = 1 << 30


def fio(path, engine, rw, size, depth, seconds):
    """Requests per second."""
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


def in_turns(rounds, least, first, second):
    """Runs both in each round, another one first each time: medians, and that of the ratios.
    Below `least` there are twice as many further rounds, and all of them count."""
    pairs = []
    ratio = lambda: statistics.median(a / max(b, 1) for a, b in pairs)
    while len(pairs) < rounds or (len(pairs) < 3 * rounds and ratio() < least):
        for number in range(rounds if not pairs else 2 * rounds):
            if number % 2:
                b, a = second(), first()
            else:
                a, b = first(), second()
            pairs.append((a, b))
    ours, theirs = (statistics.median(side) for side in zip(*pairs))
    return ours, theirs, ratio()


@contextlib.contextmanager
def places(given, directory):
    """Paths to measure on, by what they are called; what was made goes again."""
    if given:
        yield {path: path for path in given}
        return
    with tempfile.NamedTemporaryFile(prefix="uext-engines-", dir=directory) as file:
        block = os.urandom(1 << 20)
        for _ in range(BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if os.geteuid() != 0:
            yield {"file": file.name}
            return
        loop = subprocess.run(["losetup", "--direct-io=on", "-f", "--show", file.name], check=True,
                              text=True, stdout=subprocess.PIPE).stdout.strip()
        try:
            yield {"file": file.name, "loop device": loop}
        finally:
            subprocess.run(["losetup", "-d", loop], check=True)


@contextlib.contextmanager
def awake():
    """Keeps CPUs from halting, where that is allowed; whether it is."""
    try:
        with open("/dev/cpu_dma_latency", "wb", buffering=0) as latency:
            latency.write(bytes(4))
            yield True
    except OSError:
        yield False


def compare(arguments, where, path):
    """Against fio; the figures."""
    print(f"| {where} | bytes | depth | engine | uext | fio | uext/fio |")
    print("|---|---:|---:|---|---:|---:|---:|")
    rows = []
    for rw, size, depth in CELLS:
        for engine in FIO:
            if engine == "sync" and depth > SYNC_DEPTH:
                continue
            ours, theirs, ratio = in_turns(
                arguments.rounds, arguments.least,
                lambda: bench_dev(arguments.uext, path, engine, rw, size, depth, arguments.seconds),
                lambda: fio(path, engine, rw, size, depth, arguments.seconds))
            rows.append({"where": where, "rw": rw, "bytes": size, "depth": depth, "engine": engine,
                         "uext": ours, "fio": theirs, "ratio": ratio})
            print(f"| {rw} | {size} | {depth} | {engine} | {ours:,.0f} | {theirs:,.0f} "
                  f"| {ratio:.2f} |", flush=True)
    return rows


def merging(arguments, where, path):
    """What a plug gains; the figures."""
    print(f"\n| {where}: sequential 4 KiB, depth 32 | engine | plain | plugged | gain "
          "| merged by fio | disk |")
    print("|---|---|---:|---:|---:|---:|---:|")
    rows = []
    for rw in ("read", "write"):
        for engine in FIO:
            one = lambda plug: bench_dev(arguments.uext, path, engine, rw, "4k", 32,
                                         arguments.seconds, plug)
            plugged, plain, gain = in_turns(arguments.rounds, arguments.least_gain,
                                            lambda: one("on"), lambda: one("off"))
            # As 4 KiB per second.
            by_fio = lambda size, pages, depth: pages * statistics.median(
                fio(path, engine, rw, size, depth, arguments.seconds) for _ in range(3))
            merged, disk = by_fio("64k", 16, 2), by_fio("1m", 256, 8)
            rows.append({"where": where, "rw": rw, "engine": engine, "plain": plain,
                         "plugged": plugged, "gain": gain, "merged by fio": merged, "disk": disk})
            print(f"| {rw} | {engine} | {plain:,.0f} | {plugged:,.0f} | {gain:.2f} "
                  f"| {merged:,.0f} | {disk:,.0f} |", flush=True)
    print()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uext", default="uext")
    parser.add_argument("--path", nargs="*", help="files or devices whose contents may go")
    parser.add_argument("--dir", default="/var/tmp", help="where the file is made")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--merging", action="store_true", help="only what merging gains")
    parser.add_argument("--least", type=float, default=0.95)
    parser.add_argument("--least-gain", type=float, default=1.8)
    parser.add_argument("--json", help="where figures go")
    arguments = parser.parse_args()
    against, gains = [], []
    with places(arguments.path, arguments.dir) as paths, awake() as is_awake:
        print(f"load {os.getloadavg()[0]:.1f}; {arguments.rounds} rounds of {arguments.seconds} s; "
              f"CPUs {'kept from halting' if is_awake else 'may halt'}\n")
        for where, path in paths.items():
            if not arguments.merging:
                against += compare(arguments, where, path)
            gains += merging(arguments, where, path)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"against fio": against, "merging": gains}, file, indent=1)
    short = [row for row in against if row["ratio"] < arguments.least]
    short += [row for row in gains if row["gain"] < arguments.least_gain]
    for row in short:
        print("short: " + ", ".join(f"{value:.2f}" if isinstance(value, float) else str(value)
                                    for value in row.values()))
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()
