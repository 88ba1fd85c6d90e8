"""Classifies with a trained model: a full model folder, a LoRA adapter folder or a hub id.

    python infer.py output --text "房间干净，服务员也热情。"               one text: scores, and the words that decided
    python infer.py output --file my.csv --output predicted.csv           a whole table, with three columns more

The way of the texts: predict_probabilities (sorted by length, hardly any padding) -> their own order again.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from data import tokenize
from model import count_positions, name_classes
from rows import UserError, clean_label, read_cells, write_csv

CHUNK = 20_000  # texts of a table that are tokenised at a time: a million would take the memory of a machine
MAX_EXPLAINED = 2000  # characters of a text that are explained: each of its words costs one prediction


# >>> model-path
def check_model_path(path: str, named_by: str = "") -> None:
    """Raises UserError where `path` is neither a folder with a model or an adapter nor the form of a hub id."""
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            checkpoints = ", ".join(map(str, sorted(folder.glob("checkpoint-*")))) or "none"
            raise UserError(
                f"{named_by}{path}: neither config.json nor adapter_config.json is in this folder. "
                f"The training writes them when it ends; its checkpoints: {checkpoints}."
            )
    elif folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(
            f"{named_by}{path}: there is no such folder. Train first (bash train_zero2.sh), or give the folder of a "
            "model or of an adapter, or a hub id (owner/name)."
        )


def find_base_model(path: str) -> str | None:
    """The base model of a LoRA adapter folder; None where `path` is a full model.

    A relative base is looked for here first, then in the folder of this recipe, where the training was started.

    Raises:
        UserError: the base is not there.
    """
    config = Path(path, "adapter_config.json")
    if not config.is_file():
        return None
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    in_recipe = Path(__file__).parent / base
    base = str(in_recipe) if in_recipe.exists() and not Path(base).exists() else base
    check_model_path(base, named_by=f"{config} names as its base model ")
    return base


# <<< model-path


def load_trained_model(path: str, trust_remote_code: bool = False):
    """A trained classifier and its tokenizer, in eval mode, on the GPU where there is one.

    Args:
        path: folder of a full model or of a LoRA adapter (its base is loaded too), or a hub id.

    Returns:
        model, tokenizer; `model.config.id2label` names the classes.

    Raises:
        UserError: there is no such model.
    """
    check_model_path(path)
    base = find_base_model(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        name_classes(config, config.id2label)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForSequenceClassification.from_pretrained(
            base or path,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=base is not None,  # the head of the classes comes with the adapter
            trust_remote_code=trust_remote_code,
        )
        if base is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{base or path}: no model could be read there ({str(error).splitlines()[0]}).") from None
    tokenizer.model_max_length = min(tokenizer.model_max_length, count_positions(config))
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # texts are tokenised once, padded later
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def cut_into_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Rows by their length, longest first, in batches of at most `max_tokens` tokens, padding included."""
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


@torch.no_grad()
def predict_probabilities(
    model, tokenizer, texts: list[str], max_tokens: int = 8192, on_progress: Callable[[int], None] = lambda rows: None
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of each class for each text, and whether the text was too long and lost its end.

    Args:
        max_tokens: of a batch, padding included.
        on_progress: gets to know how many texts more are done.

    Returns:
        In the order of the texts: shape (texts, num_labels), fp32; shape (texts,), bool.
    """
    probabilities, cut = np.zeros((len(texts), model.config.num_labels), dtype=np.float32), np.zeros(len(texts), bool)
    for start in range(0, len(texts), CHUNK):
        encoded, cut[start : start + CHUNK] = tokenize(texts[start : start + CHUNK], tokenizer)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        for rows in cut_into_batches(lengths, max_tokens):
            batch = [{name: values[row] for name, values in encoded.items()} for row in rows]
            inputs = tokenizer.pad(batch, return_tensors="pt").to(model.device)
            probabilities[start + rows] = model(**inputs).logits.float().softmax(1).cpu().numpy()
            on_progress(len(rows))
    return probabilities, cut


def rank_classes(model, probabilities: np.ndarray) -> list[tuple[str, float]]:
    """(class, probability), the likeliest first, of one text."""
    return [(model.config.id2label[index], float(probabilities[index])) for index in np.argsort(-probabilities)]


def explain(model, tokenizer, text: str) -> list[tuple[str, float]]:
    """Each word of the first MAX_EXPLAINED characters with how much it speaks for their class.

    That is how far the log-odds of the class fall (in nats) when the word is left out; below 0 the word speaks against
    it. Source: Li et al., "Understanding Neural Networks through Representation Erasure" (2016); words: jieba.
    """
    import jieba

    jieba.setLogLevel("WARNING")
    text = text[:MAX_EXPLAINED]
    words = list(jieba.tokenize(text))
    texts = [text] + [text[:start] + text[end:] for _, start, end in words]
    probabilities = predict_probabilities(model, tokenizer, texts)[0].astype(np.float64).clip(1e-7, 1 - 1e-7)
    of_class = probabilities[:, probabilities[0].argmax()]
    log_odds = np.log(of_class / (1 - of_class))
    falls = log_odds[0] - log_odds[1:]
    return [(word, float(fall)) for (word, _, _), fall in zip(words, falls, strict=True)]


def read_texts(file: str, text_column: str) -> pd.DataFrame:
    """A table with all its columns as they are, all of them strings.

    Raises:
        UserError: it can't be read, has no such column, or a row is wider or narrower than the header (names the line).
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: there is no such file.")
    header, rows = read_cells(file, (text_column,))
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{file}:{line}: {len(cells)} cells, the header has {len(header)}.")
    return pd.DataFrame([cells for _, cells in rows], columns=header, dtype=object)


def classify_table(model, tokenizer, table: pd.DataFrame, text_column: str, on_progress=lambda rows: None):
    """The table with `predicted`, `probability` and `cut` after its own columns, or predicted_2 ... where it has such.

    The first two are empty where the text is; `cut` says that the text was too long and lost its end.
    """
    texts = table[text_column].str.strip()
    given = texts[texts != ""]
    probabilities, cut = predict_probabilities(model, tokenizer, given.tolist(), on_progress=on_progress)
    labels = np.array([model.config.id2label[index] for index in probabilities.argmax(1).tolist()], dtype=object)
    new = {"predicted": labels, "probability": probabilities.max(1).round(4), "cut": cut}
    new = pd.DataFrame(new, given.index).reindex(table.index).fillna({"predicted": "", "cut": False})
    for name, values in new.astype({"cut": bool}).items():
        names = (name, *(f"{name}_{number}" for number in range(2, table.shape[1] + 3)))
        table = table.assign(**{next(free for free in names if free not in table): values})
    return table


def classify_file(model, tokenizer, file: str, output: str, text_column: str, label_column: str) -> None:
    """Writes `classify_table` of a file, and says how many texts were empty, cut, and right where labels are there."""
    from tqdm import tqdm

    if not output.lower().endswith(".csv") or not Path(output).absolute().parent.is_dir():
        raise UserError(f"{output}: is no .csv in a folder that exists; name one by --output.")
    table = read_texts(file, text_column)
    if Path(output).resolve() == Path(file).resolve():
        raise UserError(f"{output}: is the table itself; name another file by --output.")
    if table.empty:
        raise UserError(f"{file}: there is no row in it.")
    with tqdm(total=len(table), unit="row") as bar:
        result = classify_table(model, tokenizer, table, text_column, bar.update)
    write_csv(result, output)
    names = list(result)[-3:]
    predicted, _, cut = (result[name] for name in names)
    print(f"{output}: {len(table):,} rows, the new columns are {', '.join(names)}")
    print(
        f"{(predicted == '').sum():,} of them have no text; {cut.sum():,} are longer than the model takes and were cut"
    )
    if label_column in table:
        labels = result[label_column].map(clean_label)
        labelled = (predicted != "") & (labels != "")
        right = (predicted == labels)[labelled]
        print(f"{right.mean():.4f} of the {labelled.sum():,} rows with a label got it right")


def classify_text(model, tokenizer, text: str) -> None:
    """Prints the probability of each class, and the words that decided."""
    (probabilities,), (cut,) = predict_probabilities(model, tokenizer, [text])
    for label, probability in rank_classes(model, probabilities):
        print(f"{probability:.4f}  {label}")
    print("  ".join(f"{word} {weight:+.2f}" for word, weight in explain(model, tokenizer, text)))
    if cut:
        print(f"note: longer than {tokenizer.model_max_length} tokens, its end was cut")
    if len(text) > MAX_EXPLAINED:
        print(f"note: {len(text):,} characters, of which the first {MAX_EXPLAINED:,} are explained")


def model_parser(description: str) -> argparse.ArgumentParser:
    """The command line that each program has which uses a trained model; each adds its own flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a full model or of a LoRA adapter, or a hub id")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = model_parser(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--text", help="classify this text and end")
    task.add_argument("--file", help="classify a .csv / .tsv and end")
    parser.add_argument("--output", default="predicted.csv", help="where --file writes its table")
    parser.add_argument("--text_column", default="text", help="column of the texts in --file")
    parser.add_argument("--label_column", default="label", help="column of the labels in --file, if it has one")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
        if args.file:
            classify_file(model, tokenizer, args.file, args.output, args.text_column, args.label_column)
        elif not args.text.strip():
            raise UserError("--text: there is nothing in it.")
        else:
            classify_text(model, tokenizer, args.text)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
