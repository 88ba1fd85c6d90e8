"""Training a LLaVA on a frozen tower, side by side: train_llava, TRL's SFTTrainer, and a plain padded Trainer.

    pip install -r requirements-bench.txt
    python benchmarks/bench_llava.py                    about half an hour of one core
    python benchmarks/bench_llava.py --rounds 1 --rows 80
    python benchmarks/bench_llava.py --device cuda      on one GPU, in bf16

Every way trains the projector and the language model of the same LLaVA (CLIP's vision tower, 14 layers x 768, pictures
of 112 pixels, 49 tokens each; Qwen2, 6 layers x 256, vocabulary 8192) on the same rows in the same steps, fp32, one
thread, in a process of its own; the ways take turns, `--rounds` times, and the median counts. A row is a JPEG of
640 x 480 and 30 to 500 tokens of text (log-uniform), the last 30 to 70 % of them supervised. TRL can neither pack rows
with pictures nor leave out their padding.

On a GPU it is CLIP-L/14-336 (576 tokens a picture) and a Qwen2.5-0.5B in their real shapes with random weights, fp32
with bf16 autocast; seconds by the clock.

Measured are samples a CPU second over whole epochs of `trainer.train()`; decoding, the checks before the first step and
the making of the cache are counted. In train_llava's first epoch each picture goes through the tower once, later none
does. The tower's share of a step is its forward pass, measured alone, beside the step of each way.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).resolve().parent.parent / "train_llava"
OURS, UNCACHED, TRL, PLAIN = "train_llava", "train_llava, no cache", "trl", "plain trainer"
WAYS = [OURS, UNCACHED, TRL, PLAIN]
VOCABULARY = 8192
IMAGE, PAD = VOCABULARY - 1, VOCABULARY - 2
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, image_size, patch_size
TOWERS = {"cpu": (768, 3072, 14, 12, 112, 16), "cuda": (1024, 4096, 24, 16, 336, 14)}
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
TEXT_MODELS = {"cpu": (256, 1024, 6, 4, 2), "cuda": (896, 4864, 24, 14, 2)}
DEVICES = {"cpu": {"use_cpu": True, "bf16": False}, "cuda": {"use_cpu": False, "bf16": True}}
COMMON = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


def image_tokens(device: str) -> int:
    *_, size, patch = TOWERS[device]
    return (size // patch) ** 2


def make_processor(device: str):
    """A LLaVA's processor with a token for each of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AddedToken, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(PAD)} | {"<pad>": PAD, "<image>": IMAGE}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    tokenizer.add_tokens([AddedToken("<image>", special=False, normalized=False)])
    *_, side, patch_size = TOWERS[device]
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings = {"patch_size": patch_size, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(CLIPImageProcessorPil(**size), tokenizer, **settings)


def build_model(device: str):
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    torch.manual_seed(0)
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    vision = CLIPVisionConfig(**dict(zip([*names, "image_size", "patch_size"], TOWERS[device], strict=True)))
    sizes = dict(zip([*names, "num_key_value_heads"], TEXT_MODELS[device], strict=True))
    text = Qwen2Config(**sizes, vocab_size=VOCABULARY, tie_word_embeddings=True, pad_token_id=PAD)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    model.model.vision_tower.requires_grad_(False)
    return model


def make_rows(folder: Path, count: int) -> list[dict]:
    """Rows: `ids` of a picture's single mark and words, `prompt` tokens of them, `picture`."""
    import numpy as np
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        picture = folder / f"{number}.jpg"
        coarse.resize((640, 480)).save(picture)
        length = int(np.exp(rng.uniform(np.log(30), np.log(500))))
        prompt = 1 + int(length * rng.uniform(0.3, 0.7))
        rows.append({"ids": [IMAGE, *rng.integers(0, PAD, length).tolist()], "prompt": prompt, "picture": str(picture)})
    return rows


def in_order_of_training(rows: list[dict], batch_size: int, tokens: int) -> list[dict]:
    """As train_llava's first epoch takes them, by their lengths: the others get the same steps."""
    import numpy as np

    from batch import BalancedBatchSampler

    lengths = np.array([len(row["ids"]) - 1 + tokens for row in rows])
    sampler = BalancedBatchSampler(lengths, [[i] for i in range(len(rows))], batch_size, 1, 1, 0, seed=42)
    return [rows[i] for batch in sampler for i in batch]


def as_text(ids: list[int]) -> str:
    return " ".join("<image>" if number == IMAGE else f"w{number}" for number in ids)


def build_ours(way: str, model, processor, rows: list[dict], settings: dict, folder: Path):
    """A trainer as train.py builds it."""
    import numpy as np
    from datasets import Dataset

    import features
    from arguments import TrainingArguments
    from collator import LlavaCollator
    from fast_path import FastPath
    from images import Reference
    from llava_trainer import LlavaTrainer
    from model import freeze
    from pixels import Pixels, count_image_tokens, number_of

    features.CACHE_DIR = folder / "cache"
    pixels = Pixels(processor.image_processor)
    tokens, examples = count_image_tokens(processor), []
    for row in rows:
        ids = [IMAGE] * (tokens - 1) + row["ids"]
        labels = np.where(np.arange(len(ids)) < tokens - 1 + row["prompt"], -100, ids).tolist()
        example = {"input_ids": ids, "labels": labels, "length": len(ids)}
        image_id = number_of(hashlib.sha256(Path(row["picture"]).read_bytes()).hexdigest())
        examples.append(example | {"images": [Reference(row["picture"])._asdict()], "image_ids": [image_id]})

    freeze(model, "freeze_vision")
    settings = settings | {"eval_strategy": "no", "eval_on_start": False}
    trainer = LlavaTrainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Dataset.from_list(examples),
        data_collator=LlavaCollator(pixels, IMAGE, tokens, always_image=True),
    )
    limit = 0 if way == UNCACHED else 10
    arguments = (trainer.model, pixels, [trainer.train_dataset], trainer.args, trainer.accelerator, limit)
    trainer.data_collator.source, _ = features.keep_features(*arguments)
    trainer.add_callback(FastPath(trainer))
    return trainer


def build_trl(model, processor, rows: list[dict], settings: dict):
    from datasets import Dataset, Image, List
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    columns = {
        "prompt": [as_text(row["ids"][: row["prompt"]]) for row in rows],
        "completion": [as_text(row["ids"][row["prompt"] :]) for row in rows],
        "images": [[row["picture"]] for row in rows],
    }
    dataset = Dataset.from_dict(columns).cast_column("images", List(Image()))
    return InOrder(model, SFTConfig(**settings, max_length=None), train_dataset=dataset, processing_class=processor)


def build_plain(model, processor, rows: list[dict], settings: dict, tokens: int):
    from PIL import Image
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    def collate(some: list[dict]) -> dict:
        images = [Image.open(row["picture"]).convert("RGB") for row in some]
        batch = processor(images=images, text=[as_text(row["ids"]) for row in some], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for of_row, row in zip(labels, some, strict=True):
            of_row[: tokens - 1 + row["prompt"]] = -100
        return batch | {"labels": labels}

    return InOrder(model, TrainingArguments(**settings), data_collator=collate, train_dataset=rows)


def clock(device: str) -> float:
    """CPU seconds of this process; of a GPU, when it has done all that it was asked for."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(options, folder: Path) -> dict:
    """One training run in this process."""
    import torch
    from transformers import TrainerCallback

    way, batch_size, epochs, device = options.way, options.batch_size, options.epochs, options.device
    torch.set_num_threads(1 if device == "cpu" else 4)
    sys.path.insert(0, str(RECIPE))
    rows, processor, model = make_rows(folder, options.rows), make_processor(device), build_model(device)
    tokens = image_tokens(device)
    ordered = in_order_of_training(rows, batch_size, tokens)
    settings = {"output_dir": str(folder / "out"), "num_train_epochs": epochs if way == OURS else 1}
    settings = COMMON | DEVICES[device] | settings | {"per_device_train_batch_size": batch_size}
    if way.startswith(OURS):  # imported before the clock starts, as the others' libraries are
        import fast_path  # noqa: F401
        import features  # noqa: F401
    if way == TRL:
        import trl.trainer.sft_trainer  # noqa: F401
    import deepspeed  # noqa: F401  (Accelerate imports it in every way as soon as training starts)

    marks = [clock(device)]

    class Clock(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            marks.append(clock(device))

    if way.startswith(OURS):
        trainer = build_ours(way, model, processor, rows, settings, folder)
    elif way == TRL:
        trainer = build_trl(model, processor, ordered, settings)
    else:
        trainer = build_plain(model, processor, ordered, settings, tokens)
    trainer.add_callback(Clock())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = -(-options.rows // batch_size)
    found = {
        "first": options.rows / (marks[1] - marks[0]),
        "first_loss": losses[0],
        "epoch_loss": statistics.mean(losses[:steps]),
    }
    found["later"] = (len(marks) - 2) * options.rows / (marks[-1] - marks[1]) if len(marks) > 2 else found["first"]
    if way == PLAIN:
        side = TOWERS[device][4]
        pixel_values = torch.rand(batch_size, 3, side, side, device=device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=DEVICES[device]["bf16"]):
            model.model.vision_tower(pixel_values, output_hidden_states=True)
            start = clock(device)
            for _ in range(5):
                model.model.vision_tower(pixel_values, output_hidden_states=True)
        found["tower"] = (clock(device) - start) / 5 / batch_size
    return found


def run_all(options) -> dict[str, dict]:
    """Medians over the rounds of every way, each run in a fresh process, the ways taking turns."""
    runs = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--batch_size", str(options.batch_size)]
            command += ["--epochs", str(options.epochs), "--device", options.device, "--rows", str(options.rows)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{way} failed:\n{result.stderr[-3000:]}")
            runs[way].append(json.loads(result.stdout.splitlines()[-1]))
            print(way, runs[way][-1], file=sys.stderr, flush=True)
    return {way: {name: statistics.median(run[name] for run in some) for name in some[0]} for way, some in runs.items()}


def print_table(medians: dict[str, dict], device: str) -> None:
    tower, second = medians[PLAIN]["tower"], "CPU second" if device == "cpu" else "second"
    print(f"tower: {tower:.4f} {second}s a picture\n")
    columns = ["way", f"samples / {second}, first epoch", "x TRL", "x plain"]
    columns += ["later epochs", "x TRL", "x plain", "tower's share"]
    columns += ["first loss", "mean loss of the first epoch"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for way, found in medians.items():
        cells = [way]
        for name in ("first", "later"):
            cells += [f"{found[name]:.2f}", *(f"{found[name] / medians[other][name]:.2f}" for other in (TRL, PLAIN))]
        cells += ["0 to " * (way == OURS) + f"{tower * found['first']:.0%}"]
        cells += [f"{found[name]:.5f}" for name in ("first_loss", "epoch_loss")]
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every way; the median counts")
    parser.add_argument("--rows", type=int, default=320, help="of an epoch")
    parser.add_argument("--batch_size", type=int, default=16, help="examples a step, as LLaVA has them")
    parser.add_argument("--epochs", type=int, default=2, help="of train_llava; the others' are all alike")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: one GPU, bf16, CLIP-L and a 0.5B model")
    parser.add_argument("--way", choices=WAYS, help="one run of one way in this process, as JSON")
    options = parser.parse_args()
    if options.way:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options, Path(folder))))
    else:
        print_table(run_all(options), options.device)


if __name__ == "__main__":
    main()
