#!/usr/bin/env python3
"""Compares uext with kernel ext4 and fuse2fs on the same work, in one run.

Each round makes a fresh image for each filesystem, mounts all of them, and runs each
workload on each in turn, in another order each round, so that a machine whose speed
drifts is unfair to none.  After the round each is unmounted and `e2fsck -fn` must find
nothing.  Shown are medians, the spread, and the median of the rounds' ratios.

With --null there is one more peer where names count and not data: a filesystem in memory
behind uext's own FUSE transport.  What it reaches is what FUSE leaves to any filesystem.

A filesystem is an entry in FILESYSTEMS or in a JSON file given with --define:
{"name": {"mkfs": "...", "mount": "...", "umount": "..."}}; {img}, {mnt} and {uext} are
filled in.  Needs root, fio, sqlite3, tar and e2fsprogs; a peer that is missing is left
out, and the report says so.
"""
import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import plot
from workloads import Context, Tree, chosen, shell

MKFS = "mkfs.ext4 -q -F {img}"
FILESYSTEMS = {
    "kernel": {
        "mkfs": MKFS,
        # `mount -o loop` reads and writes the image through the page cache a second time.
        # `losetup -d` of a device in use lets go of it with the last user, however that ends.
        "mount": "d=$(losetup --direct-io=on -f --show {img}); r=0; mount $d {mnt} || r=$?;"
                 " losetup -d $d; exit $r",
        "umount": "umount {mnt}",
    },
    "null": {
        "mkfs": "true",
        "mount": "{null} {mnt} </dev/null >/dev/null 2>&1 &",
        "umount": "umount {mnt}",
        # Nothing of it lies in an image.
        "memory": True,
    },
    "fuse2fs": {
        "mkfs": MKFS,
        "mount": "fuse2fs {img} {mnt} -o rw,allow_other,default_permissions",
        "umount": "umount {mnt}",
    },
    "uext": {
        "mkfs": MKFS,
        "mount": "{uext} mount {img} {mnt} -o {options}",
        "umount": "umount {mnt}",
    },
}


class Mount:
    """An image of one filesystem, mounted."""

    def __init__(self, name, commands, work, values):
        self.name, self.commands = name, commands
        self.image, self.directory = f"{work}/{name}.img", f"{work}/{name}.mnt"
        self.in_memory = commands.get("memory", False)
        self.values = {**values, "img": self.image, "mnt": self.directory}
        os.makedirs(self.directory, exist_ok=True)
        if os.path.exists(self.image):
            os.unlink(self.image)
        shell(f"truncate -s {values['size']} {self.image}")
        self.run("mkfs")
        self.run("mount")
        deadline = time.monotonic() + 10
        while not os.path.ismount(self.directory):
            if time.monotonic() > deadline:
                raise RuntimeError("not mounted after 10 s")
            time.sleep(0.05)

    def run(self, what):
        shell(self.commands[what].format(**self.values))

    def finish(self):
        """Unmounts and checks; what is wrong, or None."""
        self.run("umount")
        if self.in_memory:
            return None
        # The daemon of a peer may still write after umount(8) has returned.
        text = ""
        for _ in range(100):
            check = subprocess.run(["e2fsck", "-fn", self.image], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if check.returncode == 0:
                return None
            text = check.stdout
            time.sleep(0.2)
        return f"e2fsck -fn: {text[-500:]}"

    def abandon(self):
        subprocess.run(["umount", "-l", self.directory], stderr=subprocess.DEVNULL)


def drop_caches():
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def machine():
    """What a reader must know of the machine, as lines."""
    def first(path, key):
        with open(path) as file:
            for line in file:
                if line.startswith(key):
                    return line.split(":", 1)[1].strip()
        return "?"

    memory = int(first("/proc/meminfo", "MemTotal").split()[0]) >> 20
    tool = lambda command: subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT).stdout.split("\n")[0]
    return [
        f"{time.strftime('%Y-%m-%d')}, Linux {platform.release()}, {os.cpu_count()} CPUs "
        f"({first('/proc/cpuinfo', 'model name')}), {memory} GiB",
        f"{tool('mke2fs -V')}; {tool('fio --version')}",
    ]


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uext", default="uext", help="the program")
    parser.add_argument("--null", help="the program of the filesystem in memory")
    parser.add_argument("--options", default="allow_other,default_permissions",
                        help="mount options of uext")
    parser.add_argument("--fs", nargs="*", help="which filesystems; the last is the subject")
    parser.add_argument("--work", nargs="*", help="workloads whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="6G", help="of an image")
    parser.add_argument("--divide", type=int, default=1, help="so many times fewer files")
    parser.add_argument("--dir", default="/var/tmp", help="where images lie")
    parser.add_argument("--define", help="JSON file with further filesystems")
    parser.add_argument("--json", help="where figures go")
    parser.add_argument("--svg", help="where the picture goes")
    parser.add_argument("--report", help="where the report goes, beside the standard output")
    return parser.parse_args()


def run_round(number, names, filesystems, work, values, context, workloads, results):
    mounts = []
    try:
        for name in names:
            try:
                mounts.append(Mount(name, filesystems[name], work, values))
            except (subprocess.CalledProcessError, RuntimeError) as error:
                results.fail(name, f"left out: {getattr(error, 'output', None) or error}")
        for workload in workloads:
            # Another one begins each time: what ran before leaves its traces.
            turn = number % max(1, len(mounts))
            for mount in mounts[turn:] + mounts[:turn]:
                if mount.in_memory and not workload.names:
                    continue
                # What one has left to be written is not written while the next is timed.
                os.sync()
                if workload.cold:
                    drop_caches()
                try:
                    results.add(mount.name, workload.name, number,
                                workload.run(mount.directory, context))
                except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                    said = getattr(error, "output", "") or getattr(error, "stderr", "") or ""
                    results.fail(mount.name, f"{workload.name}: {error} {said[-300:]}")
        for mount in list(mounts):
            problem = mount.finish()
            mounts.remove(mount)
            if problem:
                results.fail(mount.name, problem)
    finally:
        for mount in mounts:
            mount.abandon()


class Results:
    def __init__(self):
        self.rounds, self.failures, self.loads = {}, [], []

    def add(self, name, workload, number, figure):
        self.rounds.setdefault(name, {}).setdefault(workload, {})[number] = figure

    def fail(self, name, problem):
        self.failures.append(f"{name}: {problem.strip()}")
        print(self.failures[-1], file=sys.stderr)

    def medians(self, name):
        return {w: statistics.median(f.values()) for w, f in self.rounds.get(name, {}).items()}

    def ratio(self, subject, peer, workload):
        """The median of the rounds' ratios."""
        ours = self.rounds.get(subject, {}).get(workload, {})
        theirs = self.rounds.get(peer, {}).get(workload, {})
        pairs = [ours[n] / theirs[n] for n in ours if theirs.get(n)]
        return statistics.median(pairs) if pairs else None

    def spread(self, name, workload):
        """Largest against smallest of the rounds."""
        figures = self.rounds.get(name, {}).get(workload, {}).values()
        return max(figures) / min(figures) if figures and min(figures) > 0 else None


def report(results, names, workloads):
    """The table, as lines."""
    subject, peers = names[-1], names[:-1]
    cell = lambda x: "-" if x is None else (f"{x:,.0f}" if x >= 100 else f"{x:.1f}")
    number = lambda x: "-" if x is None else f"{x:.2f}"
    medians = {name: results.medians(name) for name in names}
    lines = ["| work | unit | " + " | ".join(names + [f"{subject}/{p}" for p in peers])
             + f" | spread of {subject} |",
             "|---|---|" + "---:|" * (len(names) + len(peers) + 1)]
    for workload in workloads:
        figures = [medians[name].get(workload.name) for name in names]
        ratios = [results.ratio(subject, peer, workload.name) for peer in peers]
        lines.append(f"| {workload.name} | {workload.unit} | "
                     + " | ".join(list(map(cell, figures)) + list(map(number, ratios)))
                     + f" | {number(results.spread(subject, workload.name))} |")
    return lines


def write(arguments, results, names, workloads, lines):
    subject, peers = names[-1], names[:-1]
    medians = {name: results.medians(name) for name in names}
    if arguments.json:
        report = {
            "machine": lines,
            "load": results.loads,
            "options": arguments.options,
            "median": medians,
            "ratio": {peer: {w.name: results.ratio(subject, peer, w.name) for w in workloads}
                      for peer in peers},
            "rounds": results.rounds,
            "failures": results.failures,
        }
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    if arguments.svg:
        ratio = lambda peer, workload: results.ratio(subject, peer, workload)
        picture = plot.svg(ratio, subject, peers, [w.name for w in workloads], lines)
        if picture:
            with open(arguments.svg, "w") as file:
                file.write(picture)


def main():
    arguments = parse()
    if os.geteuid() != 0:
        sys.exit("bench.py: mounting needs root")
    # So that `finally` runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    filesystems = dict(FILESYSTEMS)
    if arguments.define:
        with open(arguments.define) as file:
            filesystems.update(json.load(file))
    if not arguments.null:
        del filesystems["null"]
    names = arguments.fs or list(filesystems)
    workloads = chosen(arguments.work)
    results, work = Results(), tempfile.mkdtemp(prefix="uext-bench-", dir=arguments.dir)
    values = {"size": arguments.size, "uext": arguments.uext, "null": arguments.null,
              "options": arguments.options}
    lines = machine()
    try:
        tree = Tree(f"{work}/tree.tar", 12000 // arguments.divide)
        context = Context(tree, arguments.divide)
        for number in range(arguments.rounds):
            results.loads.append(os.getloadavg()[0])
            run_round(number, names, filesystems, work, values, context, workloads, results)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    loads = ", ".join(f"{load:.1f}" for load in results.loads)
    lines.append(f"medians of {arguments.rounds} rounds; load when each began: {loads}; "
                 f"uext: -o {arguments.options}")
    text = "\n".join(report(results, names, workloads) + [""] + lines + results.failures) + "\n"
    print(text, end="")
    if arguments.report:
        with open(arguments.report, "w") as file:
            file.write(text)
    write(arguments, results, names, workloads, lines)
    sys.exit(1 if results.failures else 0)


if __name__ == "__main__":
    main()
