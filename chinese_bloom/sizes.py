"""Several sizes of BLOOM, trained one after the other and compared; bash ds_all.sh starts it and says what it reads."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil

# Parameters; hub id, None where a folder must be given; hidden size and layers of what stands for it on a CPU.
SIZES = {
    "560m": (559_214_592, "bigscience/bloom-560m", (32, 1)),
    "1b1": (1_065_314_304, "bigscience/bloom-1b1", (48, 1)),
    "1b7": (1_722_408_960, "bigscience/bloom-1b7", (64, 2)),
    "3b": (3_002_557_440, "bigscience/bloom-3b", (96, 2)),
    "7b1": (7_069_016_064, "bigscience/bloom-7b1", (128, 2)),
    "13b": (13_000_000_000, None, (160, 2)),
}
# Random weights want a larger learning rate than the script's own for a trained model.
TINY_FLAGS = ["--max_steps", "20", "--save_strategy", "no", "--learning_rate", "2e-3", "--adam_beta2", "0.95"]
EXAMPLE = (1, 24.0, 256.0)  # cards, GB a card, GB of the host: where there is no card, the choice shown is for these
USABLE = 0.8  # of a memory; the rest is for activations and buffers
LARGEST_LAYER_GB = 4.1  # 7b1's word embeddings, 250,880 x 4,096, and their gradients: ZeRO-3 gathers a layer at a time
MEASURED = ["eval_loss_before", "eval_loss_after", "tokens_per_second", "peak_memory_gb"]  # in train_results.json
COLUMNS = ["size", "way", *MEASURED, "minutes", "status"]
TITLES = ["size", "way", "loss before", "-> after", "tokens/s", "memory GB", "minutes", "status"]


def choose(parameters: float, cards: int, card_gb: float, host_gb: float) -> tuple[str, str, str]:
    """The first way of ZeRO that fits, or the last: script, settings of DeepSpeed, and why.

    Bytes a parameter, all trained by AdamW in bf16: weights 2, gradients 2 and at the step 4 more for their fp32 copy;
    weights, momentum and variance in fp32 12. ZeRO-2 shares out all but the weights, ZeRO-3 these too (Rajbhandari
    et al. 2020, https://arxiv.org/abs/1910.02054; the fp32 copy and what the host holds as in DeepSpeed's
    estimate_zero2_model_states_mem_needs and estimate_zero3_model_states_mem_needs).

    Args:
        cards: of all machines together.
        card_gb, host_gb: a single card's memory and a single machine's.
    """
    size = parameters / 1e9
    ways = [  # GB on each card, GB in the host
        ("ZeRO-2", 2 * size + 18 * size / cards, 0),
        ("ZeRO-3", 18 * size / cards + LARGEST_LAYER_GB, 0),
        ("ZeRO-2 + offload", 2 * size + 2 * size / cards, 16 * size),
        ("ZeRO-3 + offload", LARGEST_LAYER_GB, 18 * size),
    ]
    on_card, in_host = [], []
    for way, card, host in ways:
        if card > USABLE * card_gb:
            on_card.append(f"{way} needs {card:.1f} GB")
        elif host > USABLE * host_gb:
            in_host.append(f"{way} needs {host:.1f} GB")
        else:
            link = "since"
            break
    else:
        link = "though nothing is sure to fit:"
    reason = f"{way}, which needs {card:.1f} GB of a card that has {card_gb:.1f}"
    places = [(on_card, f"a card that has {card_gb:.1f}"), (in_host, f"a host that has {host_gb:.1f}")]
    if needs := [f"{', '.join(needs)} of {place}" for needs, place in places if needs]:
        reason = f"{way}, {link} {'; '.join(needs)}"
    stage, offload = way[len("ZeRO-")], "offload" if way.endswith("offload") else "no_offload"
    return f"train_zero{stage}.sh", f"ds_zero{stage}_{offload}.json", reason


def read_cards() -> list[float]:
    """GB of each visible card, asked in a process of its own: this one would keep a piece of the card's memory."""
    code = "import json, torch; cuda = torch.cuda; cards = map(cuda.get_device_properties, range(cuda.device_count()))"
    code += "; print(json.dumps([card.total_memory / 1e9 for card in cards]))"
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout)


def find_model(name: str, on_gpu: bool) -> tuple[str | None, str]:
    """Folder or hub id of a size, None for a tiny one; and what is missing."""
    folder = os.environ.get("MODELS") and f"{os.environ['MODELS']}/bloom-{name}"
    if name == "13b":
        folder = os.environ.get("MODEL_13B") or folder
    if folder:
        return folder, "" if Path(folder, "config.json").exists() else f"missing: {folder}/config.json"
    hub_id = SIZES[name][1] if on_gpu else None
    return hub_id, f"missing: BLOOM has no {name}; MODEL_13B names a folder" if on_gpu and not hub_id else ""


def copy_output(process: subprocess.Popen, log) -> bytes:
    """What a process prints until its end, as it comes, to the screen and to a file."""
    printed = b""
    while chunk := process.stdout.read1(1 << 16):
        for place in (sys.stdout.buffer, log):
            place.write(chunk)
            place.flush()
        printed += chunk
    return printed


def run(commands: list[list[str]], environment: dict[str, str], log_file: Path) -> tuple[int, str]:
    """Runs commands until one fails: status of the last, 130 after Ctrl-C, and what it printed."""
    with log_file.open("ab") as log:
        for command in commands:
            # In a session of its own Ctrl-C doesn't reach it, whose ranks would each show a traceback.
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                printed = copy_output(process, log)
                status = process.wait()
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGTERM)
                copy_output(process, log)
                process.wait()
                return 130, ""
            if status != 0:
                break
    return status, printed.decode(errors="replace")


def train_size(name: str, model: str | None, script: str, flags: list[str], output: Path) -> dict:
    """Trains one size, a tiny one where `model` is None; its status and what its train_results.json holds."""
    output.mkdir(parents=True, exist_ok=True)
    commands = []
    if model is None:
        model, (hidden_size, layers) = str(output / "tiny"), SIZES[name][2]
        size = ["--hidden_size", str(hidden_size), "--num_hidden_layers", str(layers)]
        commands = [[sys.executable, "tiny.py", model, *size, "--data_path", os.environ.get("DATA") or "data"]]
        flags = [*TINY_FLAGS, *flags]
    commands.append(["bash", script, *flags])
    status, printed = run(commands, os.environ | {"MODEL": model, "OUTPUT": str(output)}, output / "run.log")
    if status == 130:
        return {"status": "interrupted"}
    if status != 0:
        errors = re.findall(r"(?:^|[\r\n\]])error: (.*)", printed)  # one may stand behind the ] of a progress bar
        return {"status": ": ".join([f"failed (exit {status})", *errors[-1:]])}
    row = {"status": "was finished" if "nothing is left to train" in printed else "trained"}
    report = output / "train_results.json"
    if report.exists():  # only the first of several machines writes it
        results = json.loads(report.read_text())
        row |= {key: results[key] for key in MEASURED if key in results} | {"minutes": results["seconds"] / 60}
    return row


def read_sizes() -> list[str]:
    """The names in SIZES; ends with an error where the variables can't be meant."""
    names = list(dict.fromkeys(os.environ.get("SIZES", "").split())) or list(SIZES)
    if unknown := [name for name in names if name not in SIZES]:
        sys.exit(f"error: SIZES: {' '.join(unknown)}: known are {' '.join(SIZES)}, with a space between two.")
    for one in ("MODEL", "OUTPUT"):
        if os.environ.get(one):
            sys.exit(f"error: {one} is of a single run. Unset it; here {one}S names the folder of all.")
    return names


def main(flags: list[str]) -> int:
    names, cards, memory = read_sizes(), read_cards(), EXAMPLE
    if cards:
        processes = int(os.environ.get("NPROC") or len(cards)) * int(os.environ.get("NNODES") or 1)
        memory = (processes, min(cards), psutil.virtual_memory().total / 1e9)
    print(f"memory: {memory[0]} x {memory[1]:.1f} GB, host {memory[2]:.1f} GB; a fifth is kept free for activations")
    if not cards:
        print("no GPU: so it would be with the above; here the same scripts run without offload, on the CPU")
    plans = {name: (*choose(SIZES[name][0], *memory), *find_model(name, bool(cards))) for name in names}
    for name, (_, _, reason, model, missing) in plans.items():
        print(f"{name}: {missing or reason}{'' if model or missing else '; here tiny, with random weights'}")

    outputs, rows = Path(os.environ.get("OUTPUTS") or "output_sizes").absolute(), []
    outputs.mkdir(parents=True, exist_ok=True)
    for name, (script, config, reason, model, missing) in plans.items():
        way, settings = reason.partition(",")[0], ["--deepspeed", config]
        if not cards:  # all is in the host's memory anyway, and the offloaded AdamW is compiled for minutes
            way, settings = way.removesuffix(" + offload"), []
        if missing:
            rows.append({"size": name, "status": missing})
        else:
            print(f"\n{name}:", flush=True)
            rows.append({"size": name, "way": way} | train_size(name, model, script, settings + flags, outputs / name))
        (outputs / "sizes.json").write_text(json.dumps(rows, indent=2))
        if rows[-1]["status"] == "interrupted":
            break
    table = pd.DataFrame(rows, columns=COLUMNS)
    print("", table.to_string(index=False, header=TITLES, na_rep="", float_format="{:,.2f}".format), sep="\n")
    print(outputs / "sizes.json")
    statuses = {row["status"].split()[0] for row in rows}
    return 130 if "interrupted" in statuses else int("failed" in statuses or statuses == {"missing:"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
