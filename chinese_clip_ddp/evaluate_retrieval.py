"""How well images and captions find each other: after each epoch of the training, and as a command.

    python evaluate_retrieval.py output --data_path my_folder               recall, minimal pairs, mean cosine
    python evaluate_retrieval.py output --data_path my_folder --extract features.npz  the embeddings too
    python evaluate_retrieval.py output --data_path my_folder --classes classes.txt --templates templates.txt

The way of a gallery: evaluate_galleries -> each distinct image and caption is embedded once, shared out among the ranks
(embed_shares) -> retrieval_metrics, choice_accuracy, mean_cosine.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from batch import Pixels
from data import column, list_galleries, load_encoded, take_out_bad_rows
from files import UserError
from images import Reference
from infer import (
    embed_pixels,
    embed_token_ids,
    hide_progress_bars,
    load_trained_model,
    read_lines,
    read_templates,
    zero_shot,
)

BLOCK_SCORES = 1 << 24  # of similarities held at a time: 64 MB


# ------------------------------------------------------------------------------------------------------ metrics
def best_ranks(
    queries: torch.Tensor, candidates: torch.Tensor, right: torch.Tensor, block_scores: int = BLOCK_SCORES
) -> torch.Tensor:
    """The place, from 1, at which each query finds the first candidate that is right for it.

    Of equally similar candidates the wrong ones come first, and a NaN is worse than anything: a model that has
    collapsed or broken finds nothing.

    Args:
        queries, candidates: (q, d) and (c, d), normalised.
        right: (2, pairs), query and candidate of each right pair, none of them twice; each query has at least one.
        block_scores: so many similarities are held at a time, instead of all q * c.

    Returns:
        (q,) int64.
    """
    right = right[:, right[0].argsort()]
    ranks = torch.empty(len(queries), dtype=torch.long, device=queries.device)
    rows = max(1, block_scores // max(1, len(candidates)))
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ candidates.T
        first, last = torch.searchsorted(right[0], torch.tensor([start, start + rows], device=right.device)).tolist()
        query, candidate = right[0, first:last] - start, right[1, first:last]
        best = scores.new_full((len(scores),), -torch.inf)
        best.scatter_reduce_(0, query, scores[query, candidate], "amax")
        ahead = ~(scores < best[:, None])
        ahead[query, candidate] = False
        ranks[start : start + rows] = 1 + ahead.sum(1)
    return ranks


def retrieval_metrics(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_index, text_index, block_scores: int = BLOCK_SCORES
) -> dict[str, float]:
    """Recall at 1, 5 and 10 from images to texts (`i2t_r1`, ...) and back (`t2i_r1`, ...), and their `mean_recall`.

    An image with several captions is right if it finds one of them; a caption that stands with several images, if it
    finds one of those. Source: Karpathy & Fei-Fei, "Deep Visual-Semantic Alignments" (2015), as in open_clip.

    Args:
        image_embeds, text_embeds: (m, d) distinct images and (n, d) distinct captions, normalised.
        image_index, text_index: (pairs,) integers: image and caption of each pair of the gallery; each image and each
            caption is in one at least. A pair may stand there several times.
    """
    pairs = torch.stack([torch.as_tensor(image_index), torch.as_tensor(text_index)]).to(image_embeds.device)
    pairs = torch.unique(pairs, dim=1)
    ranks = {
        "i2t": best_ranks(image_embeds, text_embeds, pairs, block_scores),
        "t2i": best_ranks(text_embeds, image_embeds, pairs.flip(0), block_scores),
    }
    recalls = {f"{way}_r{k}": (rank <= k).double().mean().item() for way, rank in ranks.items() for k in (1, 5, 10)}
    return {**recalls, "mean_recall": sum(recalls.values()) / len(recalls)}


def choice_accuracy(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    choice_embeds: torch.Tensor,
    row_of_choice,
    kinds: list[str],
) -> dict[str, float]:
    """How often the true caption of an image is nearer to it than each of the row's wrong ones, by kind of those.

    A tie, or a NaN, is a miss. What recall leaves open: a model that can't see an attribute may still have a high one,
    since few others of the gallery differ by that alone (as in Winoground and SugarCrepe).

    Args:
        image_embeds, text_embeds: (rows, d), normalised: of the rows that have choices.
        choice_embeds: (choices, d), all rows' choices one after the other; row_of_choice: (choices,) the row of each.
        kinds: (rows,) what the choices change ("" is called "choices").

    Returns:
        {"choices_<kind>": accuracy}.
    """
    rows = torch.as_tensor(row_of_choice).to(image_embeds.device)
    true_scores = (image_embeds * text_embeds).sum(1)
    missed = ~((image_embeds[rows] * choice_embeds).sum(1) < true_scores[rows])
    misses = torch.zeros(len(kinds), device=rows.device).index_add_(0, rows, missed.float()).cpu()
    return {
        f"choices_{kind}".rstrip("_"): (misses[[other == kind for other in kinds]] == 0).double().mean().item()
        for kind in sorted(set(kinds))
    }


def mean_cosine(embeds: torch.Tensor) -> float:
    """Mean cosine between two different rows of (m, d) normalised embeddings: 1 where all have collapsed to one point.

    From the sum of all rows, |sum|^2 = m + what the different ones give, so no m x m matrix is needed. NaN for one row.
    """
    embeds = embeds.double()
    count = len(embeds)
    return ((embeds.sum(0).square().sum() - embeds.square().sum()) / (count * (count - 1) or torch.nan)).item()


def class_metrics(scores: torch.Tensor, labels: list[int], class_names: list[str]) -> dict:
    """Accuracy of the class with the highest score (m, classes), the mean of the classes' own, and each of them."""
    labels = torch.tensor(labels)
    right = scores.argmax(1).cpu() == labels
    own = {name: right[labels == index] for index, name in enumerate(class_names)}
    own = {name: of_class.double().mean().item() for name, of_class in own.items() if len(of_class)}
    mean = sum(own.values()) / len(own)
    return {"accuracy": right.double().mean().item(), "mean_class_accuracy": mean, "classes": own}


# ------------------------------------------------------------------------------------------------------ a gallery
def embed_shares(embed: Callable[[list], torch.Tensor], items: list) -> torch.Tensor:
    """`embed(items)`, (items, d), with each rank of a distributed run embedding an equal share of them.

    All shares have the same length (some items are embedded twice): under ZeRO-3 each forward pass is a collective.
    """
    if not dist.is_initialized():
        return embed(items)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(items) // world_size)
    padded = [items[index % len(items)] for index in range(share * world_size)]
    mine = embed(padded[rank * share : (rank + 1) * share]).contiguous()
    shares = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(shares, mine)
    return torch.cat(shares)[: len(items)]


def number_distinct(values: Sequence) -> tuple[list[int], list[int]]:
    """The position of the first of each distinct value, and for each value the number of its like."""
    numbers, first = {}, []
    for position, value in enumerate(values):
        if value not in numbers:
            numbers[value] = len(first)
            first.append(position)
    return first, [numbers[value] for value in values]


def embed_gallery(model, tokenizer, pixels, rows: Dataset, batch_size: int = 64) -> dict:
    """The embeddings of a gallery's distinct images and captions.

    Returns:
        image_embeds (m, d), text_embeds (n, d), image_index and text_index (rows,), image_rows and text_rows: the
        row at which each image and caption stands first.
    """
    image_rows, image_index = number_distinct(column(rows, "image_id").tolist())
    text_rows, text_index = number_distinct(column(rows, "caption_id").tolist())
    places, ids = rows.select_columns(["image_id", *Reference._fields]), rows.select_columns("input_ids")

    def embed_places(numbers: list[int]) -> torch.Tensor:
        parts = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
        return torch.cat([embed_pixels(model, pixels, pixels.from_rows(list(places.select(part)))) for part in parts])

    def embed_texts(numbers: list[int]) -> torch.Tensor:
        return embed_token_ids(model, tokenizer, ids.select(numbers)["input_ids"][:], batch_size)

    return {
        "image_embeds": embed_shares(embed_places, image_rows),
        "text_embeds": embed_shares(embed_texts, text_rows),
        "image_index": torch.tensor(image_index),
        "text_index": torch.tensor(text_index),
        "image_rows": image_rows,
        "text_rows": text_rows,
    }


def choice_metrics(model, tokenizer, rows: Dataset, found: dict, batch_size: int) -> dict[str, float]:
    """`choice_accuracy` of the rows of a gallery that have choices; nothing where none has."""
    choices, kinds = rows["choices"][:], rows["kind"][:]
    asked = [row for row, wrong in enumerate(choices) if wrong]
    if not asked:
        return {}
    wrong = [text for row in asked for text in choices[row]]
    first, number = number_distinct(wrong)
    ids = tokenizer([wrong[position] for position in first], truncation=True)["input_ids"]
    embeds = embed_shares(lambda part: embed_token_ids(model, tokenizer, part, batch_size), ids)
    return choice_accuracy(
        found["image_embeds"][found["image_index"][asked]],
        found["text_embeds"][found["text_index"][asked]],
        embeds[number],
        [place for place, row in enumerate(asked) for _ in choices[row]],
        [kinds[row] for row in asked],
    )


def gallery_metrics(model, tokenizer, rows: Dataset, found: dict, batch_size: int = 64) -> dict[str, float]:
    """`retrieval_metrics`, `choice_accuracy` where rows have choices, and `mean_cosine`, of one gallery.

    Args:
        found: what `embed_gallery` gives.
    """
    names = ("image_embeds", "text_embeds", "image_index", "text_index")
    metrics = retrieval_metrics(*(found[name] for name in names))
    if len(found["image_embeds"]) > 1:
        metrics["mean_cosine"] = mean_cosine(found["image_embeds"])
    return metrics | choice_metrics(model, tokenizer, rows, found, batch_size)


def evaluate_galleries(model, tokenizer, pixels, galleries: dict, batch_size: int = 64) -> dict[str, float]:
    """{"eval_<gallery>/i2t_r1": ..., "eval_<gallery>/mean_recall": ..., "eval_<gallery>/choices_<kind>": ..., ...}.

    In a distributed run every rank calls it and gets the same. The model is put into eval mode and back.

    Args:
        model: what `load_trained_model` gives, or the one in training, without DDP's or DeepSpeed's wrapper.
        pixels: batch.Pixels, which makes pixels of images as in training.
        galleries: name -> rows as data.py gives them.
    """
    was_training, metrics = model.training, {}
    model.eval()
    for name, rows in galleries.items():
        found = embed_gallery(model, tokenizer, pixels, rows, batch_size)
        values = gallery_metrics(model, tokenizer, rows, found, batch_size)
        metrics |= {f"eval_{name}/{metric}": value for metric, value in values.items()}
    model.train(was_training)
    return metrics


# ------------------------------------------------------------------------------------------------------ the command
def read_classes(path: str) -> dict[str, str]:
    """Caption -> name of its class, from lines of `name`, or of `caption<TAB>name` where rows say it otherwise.

    Raises:
        UserError: there is none, or one caption twice.
    """
    classes = {}
    for number, line in read_lines(path):
        caption, _, name = line.partition("\t")
        if caption.strip() in classes:
            raise UserError(f"{path}:{number}: {caption.strip()} stands there twice.")
        classes[caption.strip()] = name.strip() or caption.strip()
    return classes


def classify_gallery(
    model, tokenizer, rows: Dataset, found: dict, classes: dict[str, str], templates: list[str]
) -> dict:
    """`class_metrics` of zero-shot classification of a gallery whose captions are its classes.

    Raises:
        UserError: a caption is none of the classes (names the row).
    """
    names, captions, sources = list(dict.fromkeys(classes.values())), rows["text"][:], rows["source"][:]
    for caption, source in zip(captions, sources, strict=True):
        if caption not in classes:
            raise UserError(
                f"{source}: {caption!r} is none of the {len(names)} classes. With --classes each row's caption names "
                "its class; a line of caption<TAB>name says how it is called in the templates."
            )
    scores = zero_shot(model, tokenizer, found["image_embeds"][found["image_index"]], names, templates)
    return class_metrics(scores, [names.index(classes[caption]) for caption in captions], names)


def extract(path: str, model, rows: Dataset, found: dict) -> None:
    """Writes a gallery's embeddings as .npz: `image_embeds` (images, d) with `image_paths`, `text_embeds` (captions, d)
    with `texts`, the pairs as `image_index` and `text_index` (rows,) with `sources`, and `logit_scale`."""
    columns = {name: np.array(rows[name][:]) for name in ("path", "text", "source")}
    with open(path, "wb") as file:
        np.savez(
            file,
            image_embeds=found["image_embeds"].cpu().numpy(),
            text_embeds=found["text_embeds"].cpu().numpy(),
            image_index=found["image_index"].numpy(),
            text_index=found["text_index"].numpy(),
            image_paths=columns["path"][found["image_rows"]],
            texts=columns["text"][found["text_rows"]],
            sources=columns["source"],
            logit_scale=model.logit_scale.detach().exp().item(),
        )


def print_metrics(name: str, metrics: dict) -> None:
    print(name)
    for metric, value in metrics.items():
        print(f"  {metric:24} {value:.4f}")


def evaluate_path(args: argparse.Namespace) -> dict:
    """The galleries of --data_path, one after the other; returns {"eval_<gallery>/<metric>": value}."""
    classes, templates = args.classes and read_classes(args.classes), read_templates(args.templates)
    model, tokenizer, image_processor = load_trained_model(args.model)
    galleries, pixels, results = list_galleries(args.data_path), Pixels(image_processor), {}
    if args.extract and len(galleries) > 1:
        raise UserError(f"--extract: {args.data_path} has the galleries {', '.join(galleries)}; name one's file.")
    for name, path in galleries.items():
        rows = load_encoded(path, tokenizer, tokenizer.model_max_length, args.language)[0]
        rows, bad = take_out_bad_rows(rows, args.skip_bad_rows, None)
        found = embed_gallery(model, tokenizer, pixels, rows, args.batch_size)
        metrics = gallery_metrics(model, tokenizer, rows, found, args.batch_size)
        if classes:
            report = classify_gallery(model, tokenizer, rows, found, classes, templates)
            own = {f"accuracy {label}": value for label, value in report.pop("classes").items()}
            metrics |= report | own
        counts = f"{len(rows):,} pairs, {len(found['image_embeds']):,} images, {len(found['text_embeds']):,} captions"
        print_metrics(f"{name}: {counts}" + (f", {bad} bad rows left out" if bad else ""), metrics)
        results |= {f"eval_{name}/{metric}": value for metric, value in metrics.items()}
        if args.extract:
            extract(args.extract, model, rows, found)
            print(f"embeddings -> {args.extract}")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model, or a hub id")
    parser.add_argument("--data_path", required=True, help="a file, or a folder in which each file is a gallery")
    parser.add_argument("--language", default="zh", choices=["zh", "en"], help="which of zh_prompt and prompt")
    parser.add_argument("--batch_size", type=int, default=64, help="images, or captions, that are embedded at a time")
    parser.add_argument("--skip_bad_rows", action="store_true", help="go on without rows that can't be read")
    parser.add_argument("--extract", metavar="FILE.npz", help="write the embeddings there")
    parser.add_argument("--classes", metavar="FILE", help="one class a line: zero-shot classification")
    parser.add_argument("--templates", metavar="FILE", help="one sentence a line, in which {} stands for the class")
    parser.add_argument("--output", metavar="FILE.json", help="write the metrics there")
    args = parser.parse_args(argv)
    hide_progress_bars()
    try:
        if args.templates and not args.classes:
            raise UserError("--templates is for --classes, which isn't given.")
        results = evaluate_path(args)
        if args.output:
            Path(args.output).write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
