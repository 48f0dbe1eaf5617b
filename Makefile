# What a person and CI run. `make help` lists the targets.

CARGO ?= cargo
PREFIX ?= /usr/local
# Where `make demo` works; everything it makes lies there and is removed again.
DEMO_DIR ?= /var/tmp/uext-demo

UEXT := $(or $(CARGO_TARGET_DIR),target)/release/uext

.PHONY: help all deps check test models faults drive drive-fio demo install uninstall fuzz bench bench-readme bench-dev bench-micro memory test-uring identity lint-deps test-full fsx posix pjdfstest stress-ng xfstests crash crash-long mutants clean

help: ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

all: ## Build the release program
	$(CARGO) build --release -p uext-tools

deps: ## Install what the tests and the demo need (apt, as root), or list it
	@tests/scripts/deps.sh

check: ## Formatting and lints, warnings denied
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

lint-deps: ## Spelling, and the dependencies' licenses, sources and advisories
	@tests/scripts/lint-deps.sh

test: deps check ## All tests that take minutes
	$(CARGO) test --workspace --locked --no-fail-fast
	@tests/scripts/models.sh

models: ## Concurrency models under some 400,000 schedules of the journal and more, and their planted defects
	@UEXT_MODEL_FACTOR=100 tests/scripts/models.sh
	@tests/scripts/model-mutants.sh

fsx: deps ## fsx, 100,000 operations on every kind of filesystem (cargo install fsx; minutes)
	UEXT_LONG=1 $(CARGO) test --locked -p uext-tests --test programs fsx_finds -- --test-threads 1

test-full: deps ## Full sizes, all states, many seeds (an hour)
	UEXT_TEST_FULL=1 $(CARGO) test --locked -p uext-tests --test compat -- --test-threads 1
	UEXT_CRASH_KERNEL=all $(CARGO) test --locked -p uext-tests --test crash
	UEXT_SEEDS=60 $(CARGO) test --locked -p uext-tests --test badinput

memory: deps all ## The daemon's resident size with 1,000,000 files and 8 GiB (root, minutes)
	UEXT_TEST_FULL=1 UEXT_BIN=$(abspath $(UEXT)) \
		$(CARGO) test --release --locked -p uext-tests --test memory -- --nocapture --test-threads 1

faults: deps all ## Every fault point, and 200 kills under load (root, a quarter of an hour)
	UEXT_FAULT_POINTS=0 UEXT_FULL_RUNS=60 UEXT_KILLS=100 UEXT_BIN=$(abspath $(UEXT)) \
		$(CARGO) test --release --locked -p uext-tests --test fault -- --nocapture --test-threads 2

drive: deps all ## uext drive: 1,000 clients of each profile, 50 daemons killed, 10,000,000 handovers (root)
	UEXT_DRIVE_CLIENTS=1000 UEXT_KILLS=50 UEXT_BIN=$(abspath $(UEXT)) \
		$(CARGO) test --release --locked -p uext-tests --test drive -- --nocapture --test-threads 1
	UEXT_HANDOVERS=10000000 $(CARGO) test --release --locked -p uext-drive-sys --test processes -- --nocapture

drive-fio: all ## uext drive against fio: the same work on the same uext mount, in turns (root)
	@tests/scripts/drive-fio.sh $(UEXT) $(DRIVE_FIO_ARGS)

# The crash tests of `make test` with more states; the profile is as fast as a release.
CRASH = $(CARGO) test --profile crash --locked -p uext-tests --test crash
CRASH_OUT = --nocapture --test-threads=1

crash: deps ## Power cuts: hundreds of thousands of states, ten minutes
	UEXT_CRASH=more $(CRASH) -- $(CRASH_OUT)

crash-long: deps ## Power cuts: all that is there and hours of chance
	UEXT_CRASH=long $(CRASH) -- $(CRASH_OUT)

mutants: deps ## Plants defects one by one; the crash tests must catch each
	$(CRASH) --features mutants -- $(CRASH_OUT) mutants::

demo: deps all ## Make an image, mount it, copy a tree in, unmount, check it
	@tests/scripts/demo.sh $(UEXT) $(DEMO_DIR)

install: all ## Install the program, its names and man pages under PREFIX
	install -d $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)/sbin
	install -Dm755 $(UEXT) $(DESTDIR)$(PREFIX)/bin/uext
	for name in mkfs.uext fsck.uext; do ln -sf ../bin/uext $(DESTDIR)$(PREFIX)/sbin/$$name || exit 1; done
	for name in mount.fuse.uext umount.fuse.uext mount.fuseblk.uext; do ln -sf $(PREFIX)/bin/uext $(DESTDIR)/sbin/$$name || exit 1; done
	install -Dm644 -t $(DESTDIR)$(PREFIX)/share/man/man1 tools/man/uext.1
	install -Dm644 -t $(DESTDIR)$(PREFIX)/share/man/man8 tools/man/uext-mount.8 tools/man/uext-umount.8 tools/man/uext-bench-dev.8 tools/man/uext-drive.8 tools/man/uext-mkfs.8 tools/man/uext-fsck.8

uninstall: ## Remove what `make install` installed
	rm -f $(DESTDIR)$(PREFIX)/bin/uext $(DESTDIR)$(PREFIX)/sbin/mkfs.uext $(DESTDIR)$(PREFIX)/sbin/fsck.uext
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/uext.1 $(DESTDIR)$(PREFIX)/share/man/man8/uext-mount.8 $(DESTDIR)$(PREFIX)/share/man/man8/uext-umount.8 $(DESTDIR)$(PREFIX)/share/man/man8/uext-bench-dev.8 $(DESTDIR)$(PREFIX)/share/man/man8/uext-drive.8 $(DESTDIR)$(PREFIX)/share/man/man8/uext-mkfs.8 $(DESTDIR)$(PREFIX)/share/man/man8/uext-fsck.8
	rm -f $(DESTDIR)/sbin/mount.fuse.uext $(DESTDIR)/sbin/umount.fuse.uext $(DESTDIR)/sbin/mount.fuseblk.uext

posix: all ## The numbered suite, all of it, on uext and the kernel's ext4 (root)
	UEXT=$(UEXT) tests/posix/check

pjdfstest: all ## pjdfstest on uext and the kernel's ext4: the same result (root)
	@tests/scripts/pjdfstest.sh $(UEXT)

stress-ng: all ## stress-ng's filesystem stressors, 30 s each; the kernel's ext4 where one fails (root; half an hour)
	@tests/scripts/stress-ng.sh $(UEXT)

xfstests: all ## XFSTESTS=dir [ARGS=...]: a built xfstests tree on uext, e2fsck as judge (root)
	UEXT=$(UEXT) tests/xfstests/run $(XFSTESTS) $(ARGS)

fuzz: ## Build the fuzz targets (cargo-fuzz)
	cd tests/fuzz && $(CARGO) fuzz build -s none

bench: all ## Compare with kernel ext4 and fuse2fs (root)
	@$(CARGO) build --release --locked --quiet -p uext-fuse --example nullfs
	@tests/scripts/bench.sh $(UEXT) $(BENCH_ARGS)

bench-readme: all ## `make bench`, and its picture becomes the README's (root)
	@$(CARGO) build --release --locked --quiet -p uext-fuse --example nullfs
	@tests/scripts/bench.sh $(UEXT) --readme $(BENCH_ARGS)

bench-dev: all ## The engines of the block layer against fio, on a file and a loop device (a quarter of an hour)
	@PYTHONDONTWRITEBYTECODE=1 tests/bench/engines.py --uext $(UEXT) --json $(dir $(UEXT))../bench-dev.json $(BENCH_DEV_ARGS)

bench-micro: ## Time the hot parts alone (criterion)
	$(CARGO) bench -p uext-tests --bench micro --bench locks

test-uring: ## The tests of mounts, over FUSE over io_uring (root)
	@tests/scripts/test-uring.sh $(CARGO)

identity: deps ## Compare replays by uext, e2fsck and the kernel on 1,000 crash states (root)
	UEXT_LONG=1 $(CARGO) test -p uext-tests --locked --test crash replays_leave_the_same_blocks -- --nocapture

clean: ## Remove build products
	$(CARGO) clean
