.PHONY: setup test check-deploy run fmt lint

# What a build and its tests need besides a Rust toolchain and a C compiler.
setup:
	@command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest
	@command -v python3 >/dev/null || { command -v apt-get >/dev/null && apt-get update && apt-get install -y python3; } \
		|| { echo "python3 is missing: some tests and the example need it" >&2; exit 1; }

test: setup
	cargo nextest run --workspace --no-tests=pass
	cargo nextest run -p weir-queue --features shuttle

# The dashboard and the alerts against a Weir under load; CHECK_LONG=1 makes each alert fire.
check-deploy:
	cargo build -p weir-proxy
	@deploy/prometheus/check.sh "$${CARGO_TARGET_DIR:-target}/debug/weir"

# Builds Weir, serves on this machine, applies the examples, prints what to try; Ctrl-C stops it.
run:
	cargo build --release -p weir-proxy
	@deploy/run.sh target/release/weir

fmt:
	cargo fmt --all

lint:
	cargo clippy --workspace --all-targets -- -D warnings
