# Each target is what you could type yourself. PYTHON=python3.12 make demo takes another Python for the environment.
PYTHON ?= python3
ACTIVATE = . .venv/bin/activate

.PHONY: demo test lint notebooks bench

demo: .venv/demo
	$(ACTIVATE) && bash train_qwen/train_zero2.sh
	$(ACTIVATE) && cd train_qwen && python recall.py output_zero2 --show 5 --at_least 18

# The page is clicked in real time, so its test has the machine to itself.
test: .venv/test
	$(ACTIVATE) && python -m pytest tests
	$(ACTIVATE) && cd chinese_classifier && python -m pytest tests
	$(ACTIVATE) && cd train_qwen && python -m pytest tests -n 2 --ignore tests/test_page.py
	$(ACTIVATE) && cd train_qwen && python -m pytest tests/test_page.py

lint: .venv/test
	$(ACTIVATE) && ruff check . && ruff format --check .

notebooks: .venv/test
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py train_qwen

bench: .venv/bench
	$(ACTIVATE) && python benchmarks/bench_sft.py

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(ACTIVATE) && pip install -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/demo
	$(ACTIVATE) && pip install -r requirements-test.txt
	touch $@

.venv/bench: requirements-bench.txt .venv/demo
	$(ACTIVATE) && pip install -r requirements-bench.txt
	touch $@
