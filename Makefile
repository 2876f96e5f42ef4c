# Boilerhouse: `make demo` shows it at work, `make test` checks everything.
# Both set up what they need; see tools/setup.sh.

.DEFAULT_GOAL := help
.PHONY: help setup build demo test fmt lint doc unit model campaign kills bench-state image clean-test

help: ## Shows this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Installs and starts what the other targets need (root on Debian or Ubuntu), or says what is missing
	@tools/setup.sh test

build: ## Builds target/debug/boilerhouse
	cargo build --locked

demo: ## Claims a real container, writes state, releases, claims again: the state is there
	@tools/setup.sh demo
	@tools/demo.sh

test: ## Everything: format, lints, docs, image, every test on real Docker and a real S3 server
	@tools/test.sh

fmt: ## Formats the code
	cargo fmt

lint: ## Format check and lints, warnings denied
	cargo fmt --check
	cargo clippy --locked --all-targets --features crash_points -- -D warnings

doc: ## Builds the code's documentation, warnings denied
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --features crash_points --document-private-items

unit: ## Tests that need neither Docker nor S3: the library's own, and the checks of the tree
	cargo test --locked --lib --features crash_points
	cargo test --locked --test tidy --test docs --features crash_points

model: ## Tries the fence's protocol in every interleaving up to its full bounds: four million states, some minutes
	FENCE_MODEL=full cargo test --locked --features crash_points --test fence -- --nocapture

campaign: ## Random faults and crashes against a node over fakes, for CAMPAIGN_SECONDS (600); CAMPAIGN_SEED repeats one
	CAMPAIGN_SECONDS=$${CAMPAIGN_SECONDS:-600} cargo test --locked --features crash_points --test node -- --nocapture campaign p7_a_second_crash

kills: ## Kills a node with -9 in KILLS_ROUNDS (200) fills and captures on radosgw; KILLS_SEED repeats a run
	KILLS_ROUNDS=$${KILLS_ROUNDS:-200} cargo test --locked --features crash_points --test kills -- --nocapture

bench-state: ## State beside rclone, s5cmd, restic: a table, and target/bench/state.json; BENCH_QUICK=1 is short
	@tools/bench-state.sh

image: ## Builds the container image boilerhouse:latest
	@tools/image.sh

clean-test: ## Removes containers that interrupted tests and demos left behind
	@tools/clean-test.sh
