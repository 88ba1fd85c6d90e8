"""One small Ray for all tests that only need one, and runs of train.py in it on a tiny policy with random weights."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import psutil
import pytest

RECIPE = Path(__file__).parent.parent
WARM_WORKER = Path(__file__).with_name("warm_worker.py")
sys.path.insert(0, str(RECIPE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cluster  # noqa: E402

QUESTIONS = [f"{first}加{second}等于几？" for first in "一二三四五六七八" for second in "一二三四五六七八"]
# What random weights can learn in a few steps: to say numerals.
REWARD = """
def more_of_a_kind(data_source, solution_str, ground_truth, extra_info=None):
    said = [character for character in solution_str if character.strip()]
    return {"score": sum(character in "一二三四五六七八九十" for character in said) / max(len(said), 1), "acc": 0.0}
"""


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_policy(folder: Path, seed: int = 0, **changes) -> str:
    """Saves a Qwen2 of 2 layers with random weights and the recipe's tokenizer.

    Its attention has a dropout, which nothing that is compared here would bear.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tiny import train_chat_tokenizer

    tokenizer = train_chat_tokenizer(QUESTIONS, vocab_size=400)
    settings = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True},
        **{"attention_dropout": 0.3},
    }
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **(settings | changes), **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def processes_of(output) -> list[psutil.Process]:
    """Everything that works for a run: its folder is in a command line, an environment or an open log of Ray's."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(output) in word for word in process.cmdline()) or process.environ().get("RUN") == str(output):
                found.append(process)
            elif process.name().startswith("ray::"):  # its title stands where its environment was
                found += [process] if any(str(output) in file.path for file in process.open_files()) else []
    return found


def addresses_listened_on(processes: list[psutil.Process]) -> set[str]:
    addresses = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it may just have ended
            found = process.net_connections("tcp")
            addresses |= {one.laddr.ip.removeprefix("::ffff:") for one in found if one.status == psutil.CONN_LISTEN}
    return addresses


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> str:
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session", name="tokenizer")
def policy_tokenizer(policy_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy_folder)


@pytest.fixture(scope="session", name="data_file")
def prompts_file(tmp_path_factory) -> str:
    rows = [{"prompt": question, "ground_truth": "八", "data_source": "arithmetic"} for question in QUESTIONS]
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "my_rewards.py"
    path.write_text(REWARD, encoding="utf-8")
    return f"{path}:more_of_a_kind"


# Of two processes (-n 2), one has the Ray of the tests; the other has the runs that start their own.
GROUPS = {
    **{
        name: "tests' Ray"
        for name in ("test_lessons.py::test_lesson", "test_workers.py", "test_fast_path.py", "test_train.py")
    },
    **{name: "own Ray" for name in ("test_kill.py", "test_main_ppo.py")},
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A group's tests run one after another in one process, any other test where there is time for it."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for name, group in GROUPS.items() if name in nodeid), nodeid)

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items) -> None:
    """Last what waits for a minute, until all of a killed driver's Ray has gone: the others run meanwhile."""
    items.sort(key=lambda item: item.name == "test_nothing_is_left[driver]")


@pytest.fixture(scope="session")
def ray_here(tmp_path_factory):
    """Ray with two places, for as long as the tests last; its workers are forked (warm_worker.py)."""
    import ray
    from ray._private import parameter

    parameters = functools.partial(parameter.RayParams, setup_worker_path=str(WARM_WORKER))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="warm-"))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(f"{folder}/socket")
        listener.listen(16)
        settings = {"WARM_WORKERS": f"{folder}/socket"}
        with mock.patch.object(parameter, "RayParams", parameters), mock.patch.dict(os.environ, settings):
            stack.enter_context(cluster.local_cluster(2, tmp_path_factory.mktemp("ray")))
        raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
        # Ray reads the first two when it is imported, and only NVML can look for GPUs without spoiling a fork.
        environment = {"RAY_JOB_ID": ray.get_runtime_context().get_job_id(), "RAY_RAYLET_PID": str(raylet)}
        environment |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONWARNINGS": "ignore"}
        server = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(WARM_WORKER), "--serve", str(listener.fileno())],
                env=os.environ | environment,
                pass_fds=[listener.fileno()],
            )
        )
        stack.callback(server.kill)
        yield


@pytest.fixture
def start(ray_here):
    """Starts the workers of a role in a pool of their own; they end with the test."""
    import ray
    from verl.single_controller.ray import RayResourcePool

    import worker_groups
    from tokenizer import load_tokenizer

    groups, pools = [], []

    def start_here(model_args, args, completion_length: int = 8):
        tokenizer = load_tokenizer(model_args)
        pools.append(RayResourcePool([args.nproc], use_gpu=cluster.ON_GPU, max_colocate_count=1))
        policy, reference = worker_groups.start_workers(pools[-1], model_args, args, tokenizer, completion_length)
        groups.append(policy)
        return policy, reference

    def end():
        for group in groups:
            for worker in group.workers:
                ray.kill(worker)
        for pool in pools:
            for placement_group in pool.pgs or []:
                ray.util.remove_placement_group(placement_group)
        groups.clear()
        pools.clear()

    start_here.end = end
    yield start_here
    end()


@pytest.fixture
def parse_arguments(monkeypatch, policy_folder, data_file, reward_file, tmp_path):
    """The three groups of arguments for a short run, with changes."""
    from arguments import parse_arguments

    def read(**changes):
        flags = {
            **{"model_name_or_path": policy_folder, "data_path": data_file, "reward_function": reward_file},
            **{"output_dir": str(tmp_path / "output"), "max_prompt_length": 64, "max_response_length": 8},
            **{"total_training_steps": 4, "train_batch_size": 4, "ppo_mini_batch_size": 2, "rollout_n": 4, "nproc": 2},
            **{"learning_rate": 1e-3, "val_n": 2, "test_freq": 100, "save_freq": 2, "logging_steps": 100},
            **{"validation_split": 0.1},
        } | changes
        words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        return parse_arguments()

    return read


@pytest.fixture(name="run_train")
def run_reinforcement(monkeypatch, start, parse_arguments):
    """train.main() in this process and in the tests' Ray; returns the output folder."""
    import train

    @contextlib.contextmanager
    def tests_cluster(processes, output_dir):
        yield None

    def run(**changes) -> Path:
        _, _, args = parse_arguments(**changes)
        monkeypatch.setattr(train, "local_cluster", tests_cluster)
        monkeypatch.setattr(
            train, "start_workers", lambda pool, model, args, tokenizer, length: start(model, args, length)
        )
        try:
            train.main()
        finally:
            start.end()
        return Path(args.output_dir)

    return run
