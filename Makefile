.PHONY: setup test
setup:
	@command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest

test: setup
	cargo nextest run --workspace --no-tests=pass
	cargo nextest run -p weir-queue --features shuttle
