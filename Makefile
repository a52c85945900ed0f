# For a newcomer: `make demo` (sets up, builds, runs the main job) and `make test` (sets up, passes the tests).
CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=
BERTH = target/release/berth

.PHONY: all setup demo test lint bench install clean size

all: $(BERTH)

# Cargo decides what is stale.
.PHONY: $(BERTH)
$(BERTH):
	$(CARGO) build --release --locked -p berth

setup:
	scripts/setup

demo: setup $(BERTH)
	scripts/demo $(BERTH)

test: setup
	scripts/guest-kernel build/guest >/dev/null || echo "no guest kernel: tests of machines that need it are skipped"
	$(CARGO) build --locked -p berth
	$(CARGO) test --locked --workspace

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

bench: setup $(BERTH)
	benches/run $(BERTH)

# Size of the binary and the libraries it needs.
size: $(BERTH)
	@ls -l $(BERTH) | awk '{ printf "%s: %.1f MiB\n", $$NF, $$5 / 1048576 }'
	@ldd $(BERTH)

install: $(BERTH)
	install -Dm755 $(BERTH) $(DESTDIR)$(PREFIX)/bin/berth
	ln -sf berth $(DESTDIR)$(PREFIX)/bin/berth-oci
	install -Dm644 packaging/berth.service $(DESTDIR)/lib/systemd/system/berth.service
	install -Dm644 packaging/berth.socket $(DESTDIR)/lib/systemd/system/berth.socket
	$(BERTH) man --dir $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	$(BERTH) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/berth

clean:
	$(CARGO) clean
