# ARGS passes options on: make demo ARGS="--model folder", make test ARGS="-k test_1", make bench ARGS="--help".
ARGS ?=

# Two test workers with one thread each; nothing is fetched from the Hub.
TEST_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test test-versions lint bench lock clean env-test env-demo

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: env-demo ## watch a pretrained model sleep, then small ones learn to; options of the first with ARGS="..."
	@.venv/bin/python examples/demo.py $(ARGS)
	$(if $(strip $(ARGS)),,@.venv/bin/python examples/remembering.py)
	@.venv/bin/python examples/khop.py --train

test: lint ## lint, then run all tests; pytest options with ARGS="..."
	$(TEST_ENV) .venv/bin/python -m pytest -n 2 $(ARGS)

test-versions: env-test ## test on the oldest and the newest transformers; one of them, laws alone: ARGS="oldest --laws"
	@.venv/bin/python scripts/test_versions.py $(ARGS)

lint: env-test ## ruff, mypy and the import-direction check
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy hf_sleep
	.venv/bin/python scripts/check_imports.py

bench: env-demo ## run the benchmarks; options with ARGS="..."
	@.venv/bin/python benchmarks/run.py $(ARGS)

clean: ## remove caches, build outputs and laid-over releases (the environment, .venv, stays)
	rm -rf build dist *.egg-info .versions .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

lock: ## write requirements/lock.txt again with the newest releases; options of `uv pip compile` with ARGS="..."
	@scripts/lock.sh $(ARGS)

env-test:
	@scripts/setup_venv.sh test

env-demo:
	@scripts/setup_venv.sh demo
