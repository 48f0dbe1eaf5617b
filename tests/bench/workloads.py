"""What is measured: functions that take a mounted directory and give a figure.

Every figure is a rate, so higher is better everywhere.  A workload may use what an
earlier one left (`needs`); `cold` ones run after the kernel's caches were dropped.
"""
import json
import os
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from typing import Callable


def shell(command):
    """Runs a shell command; its output is in the exception when it fails."""
    return subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def seconds(work):
    """How long it takes."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def fio(directory, arguments, figure="iops", side="read"):
    """A figure of one fio job: iops, or bw in MB/s."""
    command = ["fio", "--name=w", f"--directory={directory}", "--output-format=json",
               "--group_reporting", *arguments.split()]
    text = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE).stdout
    # Notes stand before the JSON.
    job = json.loads(text[text.index("{"):])["jobs"][0][side]
    return job["bw_bytes"] / 1e6 if figure == "bw" else job["iops"]


class Tree:
    """A tar archive of real files: this machine's own headers and libraries."""

    ROOTS = ("/usr/include", "/usr/lib/python3", "/usr/share/perl", "/usr/share/doc")

    def __init__(self, path, most_files):
        self.path, self.files = path, 0
        with tarfile.open(path, "w") as archive:
            for file in self._find():
                archive.add(file)
                self.files += 1
                if self.files == most_files:
                    break

    def _find(self):
        for root in self.ROOTS:
            for directory, names, files in os.walk(root):
                names.sort()
                for name in sorted(files):
                    file = os.path.join(directory, name)
                    if (os.path.isfile(file) and not os.path.islink(file)
                            and os.path.getsize(file) <= 4 << 20):
                        yield file


@dataclass
class Context:
    """What workloads share."""
    tree: Tree
    #: Counts are divided by it, for a quick look.
    divide: int = 1


def make_files(top, count):
    for n in range(20):
        os.makedirs(f"{top}/{n}")
        for i in range(count // 20):
            os.close(os.open(f"{top}/{n}/{i}", os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644))


def parallel(count, work):
    """Runs work(0), work(1), … in processes of their own."""
    children = []
    for n in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(n)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise RuntimeError("a process failed")


def sequential_write(mount, _):
    return fio(mount, "--rw=write --bs=1M --size=1G --end_fsync=1 --filename=seq", "bw", "write")


def sequential_read(mount, _):
    return fio(mount, "--rw=read --bs=1M --size=1G --filename=seq", "bw")


def sequential_read_warm(mount, _):
    # The caches were dropped before the cold reads of whoever came after.
    shell(f"cat {mount}/seq > /dev/null")
    return fio(mount, "--rw=read --bs=1M --size=1G --filename=seq --invalidate=0 --loops=3", "bw")


def sequential_read_direct(mount, _):
    return fio(mount, "--rw=read --bs=1M --size=1G --filename=seq --direct=1", "bw")


RANDOM_DIRECT = ("--rw=randread --bs=4k --size=1G --filename=seq --direct=1 --runtime=4"
                 " --time_based")


def random_read_depth_1(mount, _):
    return fio(mount, f"{RANDOM_DIRECT} --ioengine=psync")


def random_read_depth_32(mount, _):
    return fio(mount, f"{RANDOM_DIRECT} --ioengine=libaio --iodepth=32")


def random_write(mount, _):
    return fio(mount, "--rw=randwrite --bs=4k --size=1G --io_size=128M --filename=seq"
               " --end_fsync=1", "iops", "write")


def append_fdatasync(mount, _):
    return fio(mount, "--rw=write --bs=4k --size=64M --fdatasync=1 --runtime=4 --time_based"
               " --filename=log", "iops", "write")


def create(mount, context):
    count = 20000 // context.divide
    return count / seconds(lambda: make_files(f"{mount}/create", count))


def create_by(jobs):
    def run(mount, context):
        each = 20000 // jobs // context.divide

        def work(n):
            make_files(f"{mount}/create-{jobs}.{n}", each)

        return each * jobs / seconds(lambda: parallel(jobs, work))
    return run


def small_files_write(mount, context):
    directory, data, count = f"{mount}/small", os.urandom(4096), 10000 // context.divide
    os.mkdir(directory)

    def work():
        for i in range(count):
            file = os.open(f"{directory}/{i}", os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
            os.write(file, data)
            os.close(file)
        os.sync()
    return count / seconds(work)


def for_each_small(mount, work):
    count, start = 0, time.monotonic()
    for directory, _, names in os.walk(f"{mount}/small"):
        for name in names:
            work(os.path.join(directory, name))
            count += 1
    return count / (time.monotonic() - start)


def read_whole(path):
    with open(path, "rb") as file:
        file.read()


def small_files_stat(mount, _):
    return for_each_small(mount, os.lstat)


def small_files_read(mount, _):
    return for_each_small(mount, read_whole)


def untar(mount, context):
    os.mkdir(f"{mount}/tree")
    work = lambda: (shell(f"tar xf {context.tree.path} -C {mount}/tree"), os.sync())
    return context.tree.files / seconds(work)


def tar(mount, context):
    # Through a pipe: tar reads nothing when it writes to /dev/null.
    work = lambda: shell(f"tar cf - -C {mount}/tree . | cat > /dev/null")
    return context.tree.files / seconds(work)


def remove_tree(mount, context):
    work = lambda: (shell(f"rm -rf {mount}/tree"), os.sync())
    return context.tree.files / seconds(work)


def big_directory_create(mount, context):
    directory, count = f"{mount}/big", 30000 // context.divide
    os.mkdir(directory)

    def work():
        for i in range(count):
            path = f"{directory}/a-rather-longer-name-{i:08d}"
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        os.sync()
    return count / seconds(work)


def big_directory_unlink(mount, _):
    directory = f"{mount}/big"
    names = sorted(os.listdir(directory))

    def work():
        for name in names:
            os.unlink(f"{directory}/{name}")
        os.sync()
    return len(names) / seconds(work)


def sqlite(mount, context):
    count = 400 // context.divide
    inserts = "".join(f"insert into t(b) values('{i:0100d}');" for i in range(count))
    script = ("pragma journal_mode=delete; create table t(a integer primary key, b text);"
              + inserts)
    work = lambda: subprocess.run(["sqlite3", f"{mount}/t.db"], input=script, text=True,
                                  check=True, stdout=subprocess.PIPE)
    return count / seconds(work)


@dataclass
class Workload:
    name: str
    unit: str
    run: Callable
    cold: bool = False
    #: Names of earlier workloads whose files it uses.
    needs: tuple = field(default=())
    #: Names and attributes count and not the disk: a filesystem in memory can be a peer.
    names: bool = False


SEQ, SMALL, TREE, BIG = ("sequential write",), ("small files written",), ("untar",), (
    "30k in one directory created",)

WORKLOADS = [
    Workload("sequential write", "MB/s", sequential_write),
    Workload("sequential read cold", "MB/s", sequential_read, True, SEQ),
    Workload("sequential read warm", "MB/s", sequential_read_warm, False, SEQ),
    Workload("sequential read O_DIRECT", "MB/s", sequential_read_direct, True, SEQ),
    Workload("random read 4k O_DIRECT depth 1", "1/s", random_read_depth_1, True, SEQ),
    Workload("random read 4k O_DIRECT depth 32", "1/s", random_read_depth_32, True, SEQ),
    Workload("random write 4k", "1/s", random_write, True, SEQ),
    Workload("append and fdatasync", "1/s", append_fdatasync),
    Workload("create", "1/s", create, names=True),
    Workload("create, 2 jobs", "1/s", create_by(2), names=True),
    Workload("create, 16 jobs", "1/s", create_by(16), names=True),
    Workload("small files written", "1/s", small_files_write, names=True),
    Workload("stat cold", "1/s", small_files_stat, True, SMALL, names=True),
    Workload("small files read cold", "1/s", small_files_read, True, SMALL),
    Workload("untar", "files/s", untar, names=True),
    Workload("tar cold", "files/s", tar, True, TREE),
    Workload("rm -rf", "files/s", remove_tree, True, TREE, names=True),
    Workload("30k in one directory created", "1/s", big_directory_create, names=True),
    Workload("30k in one directory unlinked", "1/s", big_directory_unlink, True, BIG, names=True),
    Workload("sqlite transactions", "1/s", sqlite),
]


def chosen(words):
    """Workloads whose name contains one of the words, and what they need."""
    if not words:
        return list(WORKLOADS)
    names = {w.name for w in WORKLOADS if any(word in w.name for word in words)}
    for workload in WORKLOADS:
        if workload.name in names:
            names.update(workload.needs)
    # `rm -rf` takes the tree away, so it is last of those that need it; one level of
    # needs is all there is.
    return [w for w in WORKLOADS if w.name in names]
