"""Every family of causal models through train_qwen: loss, gradients, adapters, saving; and the table that shows it.

python tests/check_families.py                    all families; fails where the READMEs' tables are out of date
python tests/check_families.py qwen2 mixtral      these
python tests/check_families.py --write            all families, and the tables anew
"""

import argparse
import copy
import re
import sys
import tempfile
import time
import warnings

import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from families import FAMILIES, UNABLE, UNABLE_ZH, build, make_rows, plain_loss_and_gradients
from repository import ROOT

sys.path.insert(0, str(ROOT / "train_qwen"))

from arguments import ModelArguments, TrainingArguments
from batch import collate
from fast_path import FastPath
from lora import add_lora, describe_adapters
from trainer import SFTTrainer

MARKS = ("<!-- families -->", "<!-- /families -->")
ROWS = make_rows()
TARGETS = sum(label != -100 for row in ROWS for label in row["labels"][1:])


def make_trainer(model: nn.Module, folder: str) -> SFTTrainer:
    args = TrainingArguments(output_dir=folder, use_cpu=True, eval_strategy="no", eval_on_start=False, bf16=False)
    return SFTTrainer(model, args, train_dataset=Dataset.from_list(ROWS))


def check_step(model: nn.Module, folder: str) -> dict:
    """The loss and every gradient of a step on the fast path are those of the plain model, a row a call."""
    expected_loss, expected = plain_loss_and_gradients(model, ROWS)
    trainer = make_trainer(model, folder)
    trainer.refuse_padding_that_changes_the_loss()
    path = FastPath(trainer)
    path.choose_ways()
    taken = {
        "rows": "flat" if path.padding_free else "padded",
        "head": "supervised" if path.head_is_chunked else "all",
        "smaller layers": path.smaller_layers,
    }
    loss = trainer.summed_loss(model, collate(ROWS)) / TARGETS
    loss.backward()
    assert abs(loss.item() - expected_loss) < 1e-5 * expected_loss, f"loss {loss.item()}, not {expected_loss}"
    largest = max(gradient.norm() for gradient in expected.values() if gradient is not None)
    for name, parameter in model.named_parameters():
        own, found = expected[name], parameter.grad
        own, found = (torch.zeros(()) if gradient is None else gradient for gradient in (own, found))
        assert (own - found).norm() <= 1e-4 * own.norm() + 1e-5 * largest, f"gradient of {name}"
    model.zero_grad()
    path.undo.close()
    return taken


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ROWS[0]["input_ids"]]), use_cache=False).logits


def check_saving(model: nn.Module, folder: str) -> None:
    """A saved model has the same logits when it is read again."""
    model.save_pretrained(folder)
    difference = (logits_of(AutoModelForCausalLM.from_pretrained(folder)) - logits_of(model)).abs().max()
    assert difference < 1e-5, f"saved and read again, logits differ by {difference:.2g}"


def check_adapters(family: str, folder: str) -> str:
    """At default flags every adapter moves, and a saved one gives the same logits; the layers that have none."""
    from peft import PeftModel

    model_args = ModelArguments(use_lora=True)
    model = add_lora(build(family), model_args)
    trainer = make_trainer(model, folder)
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = copy.deepcopy(adapters)
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-3)
    path = FastPath(trainer)
    path.choose_ways()
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        (trainer.summed_loss(model, collate(ROWS)) / TARGETS).backward()
        optimizer.step()
    path.undo.close()
    still = [name for name, weight in adapters.items() if torch.equal(weight, before[name])]
    assert not still, f"{len(still)} of {len(adapters)} adapter tensors did not move: {still[0]}"
    model.save_pretrained(folder)
    read = PeftModel.from_pretrained(build(family), folder)
    difference = (logits_of(read) - logits_of(model)).abs().max()
    assert difference < 1e-5, f"adapters saved and read again: logits differ by {difference:.2g}"
    without = [message for message in describe_adapters(model, model_args) if message.startswith("no adapters on ")]
    return re.sub(r" x\d+", "", "".join(without)).removeprefix("no adapters on ").partition(":")[0]


def check_family(family: str) -> dict:
    """What of the fast path the family takes, and the layers that get no adapter.

    Raises:
        AssertionError, UserError: it can't be trained rightly.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = build(family)
        taken = check_step(model, f"{folder}/step")
        check_saving(model, f"{folder}/model")
        without = check_adapters(family, f"{folder}/adapter")
    return taken | {"without": without}


def tables(results: dict[str, dict]) -> dict[str, str]:
    """What README.md and README_zh.md show of the families: a collapsed table in each."""
    words = {
        "README.md": (
            f"{len(results)} families of causal models were put through a training step",
            ("family", "batches", "head on", "norms and MLPs that keep less", "LoRA's default leaves out"),
            {"flat": "without padding", "padded": "padded", "supervised": "supervised tokens", "all": "all tokens"},
            "Not taken",
            UNABLE,
        ),
        "README_zh.md": (
            f"{len(results)} 个因果语言模型家族各走了一步训练",
            ("家族", "批次", "输出层算在", "归一化与 MLP 少存激活", "LoRA 默认不加在"),
            {"flat": "没有填充", "padded": "补齐", "supervised": "有标签的 token", "all": "全部 token"},
            "不接受",
            UNABLE_ZH,
        ),
    }
    texts = {}
    for file, (title, heads, word, unable, reasons) in words.items():
        lines = [f"<details><summary>{title}</summary>", "", f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
        for family, found in results.items():
            layers = "✓" if found["smaller layers"] else ""
            cells = [family, word[found["rows"]], word[found["head"]], layers, found["without"]]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"{unable}: {family}: {reason}." for family, reason in reasons.items()), "", "</details>"]
        texts[file] = "\n".join(lines)
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="names of Transformers' model types; all unless given")
    parser.add_argument("--write", action="store_true", help="all of them, and the tables of the READMEs anew")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    results, failed = {}, []
    for family in args.families or FAMILIES:
        start = time.perf_counter()
        try:
            results[family] = check_family(family)
            found = " ".join(f"{value!s:>12}" for value in results[family].values())
        except Exception as error:  # the others are checked all the same
            failed.append(family)
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{family:20} {found} {time.perf_counter() - start:6.2f} s", flush=True)
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}")
    if args.families:
        return
    for file, table in tables(results).items():
        path = ROOT / file
        before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
        old, _, after = rest.partition(MARKS[1])
        if args.write:
            path.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")
        elif old.strip() != table:
            sys.exit(f"{file}: its table of families is out of date: python tests/check_families.py --write")


if __name__ == "__main__":
    main()
