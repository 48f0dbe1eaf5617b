#!/usr/bin/env python3
"""Compares `uext drive` with fio: the same work on the same uext mount, in turns.

What fio can express of drive's profiles: the two halves of `stream` and of `database`,
each by itself, the latter without its log. (In a mixture fio syncs again after each read
that follows the fourth write, which is twice as often as once for four writes.) fio
verifies as drive does, a crc32c for each block that is written or read, where it can; in
a file that several jobs write at random it can't. Rates without are shown beside them.

Prints medians and ratios, and ends with 1 when drive is more than 10 % slower.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

STREAM = """
name = "{name}"
files = 2
file_size = "64m"
block = "4k"
io = "1m"
[steps]
{step} = 1
"""

DATABASE = """
name = "database"
files = 1
file_size = "64m"
block = "8k"
share = 4
sync = "fdatasync"
sync_every = 4
[steps]
{step} = 1
"""

# name, clients, drive's workload, fio's options
WORK = [
    ("stream, write", 2, STREAM.format(name="stream", step="rewrite"),
     "--rw=write --bs=1m --nrfiles=2 --filesize=64m --file_service_type=sequential"),
    ("stream, read", 2, STREAM.format(name="stream", step="scan"),
     "--rw=read --bs=1m --nrfiles=2 --filesize=64m --file_service_type=sequential"),
    ("database, write", 4, DATABASE.format(step="write"),
     "--rw=randwrite --bs=8k --fdatasync=4 --filename=shared --filesize=64m --norandommap"),
    ("database, read", 4, DATABASE.format(step="read"),
     "--rw=randread --bs=8k --filename=shared --filesize=64m --norandommap"),
]
VERIFY = "--verify=crc32c --do_verify=0 --verify_interval="


def run(command, **options):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def fio(directory, jobs, options, seconds, verify):
    """Reads and writes per second, with the files made before."""
    os.makedirs(directory, exist_ok=True)
    words = ["fio", "--name=job", f"--directory={directory}", f"--numjobs={jobs}", "--ioengine=psync"]
    words += options.split()
    if verify:
        words += (VERIFY + ("8k" if "--bs=8k" in options else "4k")).split()
    if verify and "read" in options:
        # What is verified must have been written so.
        layout = [word.replace("read", "write").replace("randwrite", "write") for word in words]
        run([word.replace("--numjobs=4", "--numjobs=1") for word in layout], cwd=directory)
    words += ["--overwrite=1", "--fallocate=none", "--invalidate=0", "--time_based", f"--runtime={seconds}"]
    text = run(words + ["--group_reporting", "--output-format=json"], cwd=directory)
    job = json.loads(text[text.index("{"):])["jobs"][0]
    shutil.rmtree(directory)
    return job["read"]["iops"] + job["write"]["iops"]


def drive(uext, directory, clients, workload, seconds):
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(workload)
        file.flush()
        command = [uext, "drive", directory, "--workload", file.name, "--clients", str(clients)]
        ops = json.loads(run(command + ["--time", f"{seconds}s", "--json", "-"]))["ops"]
    return sum(ops[op]["per_second"] for op in ("read", "write") if op in ops)


def compare(uext, directory, rounds, seconds):
    slower = []
    print(f"{'work':15} {'drive/s':>9} {'fio/s':>9} {'fio verifying/s':>16} {'drive : fio':>12} {'the same':>9}")
    for name, clients, workload, options in WORK:
        rates = {"drive": [], "fio": [], "verifying": []}
        can_verify = "--rw=randwrite" not in options
        for _ in range(rounds):
            rates["fio"].append(fio(f"{directory}/fio", clients, options, seconds, False))
            rates["drive"].append(drive(uext, directory, clients, workload, seconds))
            if can_verify:
                rates["verifying"].append(fio(f"{directory}/fio", clients, options, seconds, True))
        # Round by round: what else the machine does comes and goes.
        like = rates["verifying"] if can_verify else rates["fio"]
        ratio = statistics.median(d / f for d, f in zip(rates["drive"], like))
        plain = statistics.median(d / f for d, f in zip(rates["drive"], rates["fio"]))
        median = {key: statistics.median(values or [0]) for key, values in rates.items()}
        verifying = f"{median['verifying']:.0f}" if can_verify else "can't"
        print(f"{name:15} {median['drive']:9.0f} {median['fio']:9.0f} {verifying:>16} {plain:12.2f} {ratio:9.2f}",
              flush=True)
        if ratio < 0.9:
            slower.append(name)
    return slower


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uext", required=True, help="the program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each run")
    parser.add_argument("--kernel", action="store_true", help="mount with the kernel's ext4 instead")
    arguments = parser.parse_args()
    uext = os.path.abspath(arguments.uext)
    with tempfile.TemporaryDirectory(prefix="uext-drive-fio-", dir="/var/tmp") as work:
        image, mount = f"{work}/image", f"{work}/mnt"
        os.mkdir(mount)
        with open(image, "wb") as file:
            file.truncate(4 << 30)
        run(["mkfs.ext4", "-q", "-F", image])
        run(["mount", "-o", "loop", image, mount] if arguments.kernel
            else [uext, "mount", image, mount, "--log-file", f"{work}/log"])
        try:
            slower = compare(uext, mount, arguments.rounds, arguments.seconds)
        finally:
            subprocess.run(["umount", mount] if arguments.kernel else [uext, "umount", mount], check=False)
    if slower:
        sys.exit(f"drive is slower than fio: {', '.join(slower)}")


if __name__ == "__main__":
    main()
