"""Composes the configurations of the GPU scripts as they stand there and runs verl's own checks on them, without a GPU.

python -m base03_main_ppo.check_configs                also shows what each sets otherwise than verl

verl's YAML accepts any key, so a misspelt one would be ignored: here each key must be one of verl's.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from base03_main_ppo.untuned import save_untuned
from prepare import write_task

HERE = Path(__file__).resolve().parent
SCRIPTS = ("train_vllm.sh", "train_cluster.sh")
ALGORITHMS = ("grpo", "ppo")
FREE = ("actor_rollout_ref.model.override_config.", "critic.model.override_config.", "ray_kwargs.ray_init.")


def read_overrides(script: str, algorithm: str, model: str, *arguments: str) -> tuple[str, list[str]]:
    """The configuration's name and the overrides with which a script would start main_ppo, on 8 GPUs a machine."""
    settings = {"DRY_RUN": "1", "ALGORITHM": algorithm, "MODEL": model, "NPROC": "8"}
    settings |= {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1", "RAY_AUTH_TOKEN": "secret"}
    bash = ["bash", str(HERE / script), *arguments]
    shown = subprocess.run(bash, env=os.environ | settings, check=True, capture_output=True, text=True).stdout
    words = shown.split("\n")
    start = words.index("--config-name")
    return words[start + 1], words[start + 2 : -1]


def compose_config(name: str, overrides: list[str]) -> DictConfig:
    """What main_ppo makes of them; raises Hydra's error for an override of an unknown key."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(HERE / "config"), version_base=None):
        return compose(name, [*overrides, "hydra.searchpath=[pkg://verl.trainer.config]"])


def compose_verls() -> DictConfig:
    """verl's own configuration."""
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer")


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """`a.b.c` -> value, of all that is no dictionary."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def check_script(script: str, algorithm: str, model: str, *arguments: str) -> dict[str, tuple]:
    """Runs the checks that main_ppo and its workers run before they load a model.

    Returns:
        For each key that isn't as verl has it: verl's value and ours.

    Raises:
        ValueError: keys that verl doesn't know. What verl's own checks raise, they raise.
    """
    name, overrides = read_overrides(script, algorithm, model, *arguments)
    config = compose_config(name, overrides)
    theirs = flatten(OmegaConf.to_container(compose_verls()))
    ours = flatten(OmegaConf.to_container(config))
    unknown = [key for key in ours if key not in theirs and not key.startswith(FREE)]
    if unknown:
        raise ValueError(f"{script} with {algorithm}: verl knows no {', '.join(unknown)}")
    validate_config(config, need_reference_policy(config), need_critic(config))
    actor_rollout_ref = config.actor_rollout_ref
    parts = [config.algorithm, actor_rollout_ref.model, actor_rollout_ref.rollout, actor_rollout_ref.ref.fsdp_config]
    for part in [*parts, config.critic] if need_critic(config) else parts:
        omega_conf_to_dataclass(part)
    get_custom_reward_fn(config)
    return {key: (theirs.get(key), value) for key, value in ours.items() if value != theirs.get(key)}


if __name__ == "__main__":
    write_task("arithmetic", HERE.parent / "cache_data" / "arithmetic")
    with tempfile.TemporaryDirectory() as model:
        save_untuned(HERE.parent / "cache_data" / "arithmetic" / "sft.jsonl", model)
        for script in SCRIPTS:
            for algorithm in ALGORITHMS:
                differences = check_script(script, algorithm, model)
                print(f"\n{script}, {algorithm}: verl accepts it. What it sets otherwise than verl:")
                print(*(f"  {key}: {before} -> {after}" for key, (before, after) in differences.items()), sep="\n")
