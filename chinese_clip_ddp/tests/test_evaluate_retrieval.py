"""Recall, minimal pairs and the mean cosine against plain loops; ties, NaN; what a gallery's rows become."""

import json
import math
import multiprocessing
import random
import re
import shutil
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_gallery import build_model, draw_gallery
from torch.nn.functional import normalize

from batch import Pixels
from data import load_encoded
from evaluate_retrieval import (
    best_ranks,
    choice_accuracy,
    class_metrics,
    embed_shares,
    evaluate_galleries,
    main,
    mean_cosine,
    number_distinct,
    retrieval_metrics,
)
from infer import embed_captions, embed_pictures, open_picture, probabilities, zero_shot
from infer import main as ask_infer


def random_units(count: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain_recall(queries, candidates, right: set[tuple[int, int]], k: int) -> float:
    """The share of the queries with a right candidate among the first k, one query at a time."""
    found = 0
    for query in range(len(queries)):
        scores = [(float(queries[query] @ candidate), number) for number, candidate in enumerate(candidates)]
        nearest = [number for _, number in sorted(scores, reverse=True)[:k]]
        found += any((query, number) in right for number in nearest)
    return found / len(queries)


@pytest.mark.parametrize("block_scores", [1, 100, 1 << 24])
def test_recall_with_several_captions_an_image_and_captions_of_several_images(block_scores):
    images, texts = random_units(30, seed=0), random_units(70, seed=1)
    texts = normalize(texts + 0.9 * images[torch.arange(70) % 30], dim=1)
    image_index = [*(number % 30 for number in range(70)), 3, 4, 4, 7]
    text_index = [*range(70), 0, 0, 0, 68]  # caption 0 stands with images 0, 3 and 4 (twice), caption 68 with 8 and 7
    metrics = retrieval_metrics(images, texts, image_index, text_index, block_scores)
    pairs = set(zip(image_index, text_index, strict=True))
    for k in (1, 5, 10):
        assert metrics[f"i2t_r{k}"] == plain_recall(images, texts, pairs, k)
        assert metrics[f"t2i_r{k}"] == plain_recall(texts, images, {pair[::-1] for pair in pairs}, k)
    recalls = [metrics[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert metrics["mean_recall"] == pytest.approx(sum(recalls) / 6)
    assert 0.2 < metrics["i2t_r1"] < metrics["i2t_r10"] < 1


def test_a_tie_and_a_nan_find_nothing():
    same = torch.ones(12, 1)
    pairs = torch.arange(12).repeat(2, 1)
    assert best_ranks(same, same, pairs).tolist() == [12] * 12
    assert retrieval_metrics(same, same, *pairs)["mean_recall"] == 0
    assert best_ranks(same * torch.nan, same, pairs).tolist() == [12] * 12
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert best_ranks(two, two, torch.arange(2).repeat(2, 1)).tolist() == [1, 1]
    assert best_ranks(two, two, torch.tensor([[0, 1], [1, 0]])).tolist() == [2, 2]


def test_the_true_caption_must_beat_all_choices_of_its_row():
    unit = torch.eye(3)
    found = choice_accuracy(
        image_embeds=unit[[0, 1, 2, 2]],
        text_embeds=unit[[0, 1, 2, 1]],
        choice_embeds=unit[[1, 2, 0, 1, 0, 0]],
        row_of_choice=[
            0,
            0,
            1,
            1,
            2,
            3,
        ],  # a wrong one of row 1 ties; row 3 has another caption
        kinds=["form", "form", "colour", ""],
    )
    assert found == {"choices": 0.0, "choices_colour": 1.0, "choices_form": 0.5}
    nan = choice_accuracy(unit[:1] * torch.nan, unit[:1], unit[1:2], [0], ["form"])
    assert nan == {"choices_form": 0.0}


def test_mean_cosine_is_that_of_different_images():
    units = random_units(40, seed=2)
    plain = [float(units[i] @ units[j]) for i in range(40) for j in range(40) if i != j]
    assert mean_cosine(units) == pytest.approx(sum(plain) / len(plain), abs=1e-6)
    assert mean_cosine(units[:1].repeat(5, 1)) == pytest.approx(1, abs=1e-6)
    assert math.isnan(mean_cosine(units[:1]))


def test_accuracy_of_classes_weighs_the_classes_as_well():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.1, 0.0], [0.7, 0.1, 0.0], [0.9, 0.1, 0.0]])
    found = class_metrics(scores, [0, 0, 0, 1], ["猫", "狗", "鸟"])
    assert found == {"accuracy": 0.75, "mean_class_accuracy": 0.5, "classes": {"猫": 1.0, "狗": 0.0}}


def test_equal_values_are_numbered_once():
    assert number_distinct(["b", "a", "b", "c", "a"]) == ([0, 1, 3], [0, 1, 0, 2, 1])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of 12 scenes with wrong captions to choose from, and the true captions."""
    folder = tmp_path_factory.mktemp("gallery") / "scenes"
    return folder, draw_gallery(folder)


@pytest.fixture(scope="module")
def embeds(drawn, loaded):
    """The images' and the captions' unit vectors, by the serving functions."""
    pictures = [open_picture(str(drawn[0] / f"images/{number:03}.png")) for number in range(12)]
    return embed_pictures(loaded[0], Pixels(loaded[2]), pictures), embed_captions(*loaded[:2], drawn[1])


def test_a_gallery_is_measured_by_its_distinct_images_and_captions(drawn, loaded, embeds, tmp_path):
    model, tokenizer, image_processor = loaded
    table = drawn[0] / "gallery.jsonl"
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    again = drawn[0] / "again.jsonl"  # the same rows, some of them twice, an image under a second name
    (drawn[0] / "images/copy.png").write_bytes((drawn[0] / "images/004.png").read_bytes())
    rows += [rows[0], rows[3], rows[4] | {"image": "images/copy.png"}]
    random.Random(0).shuffle(rows)
    again.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    galleries = {path.stem: load_encoded(str(path), tokenizer, 64)[0] for path in (table, again)}
    model.train()
    metrics = evaluate_galleries(model, tokenizer, Pixels(image_processor), galleries, batch_size=5)
    assert model.training
    model.eval()
    expected = retrieval_metrics(*embeds, range(12), range(12))
    for name in ("gallery", "again"):
        own = {key.split("/")[1]: value for key, value in metrics.items() if key.startswith(f"eval_{name}/")}
        assert own.pop("mean_cosine") == pytest.approx(mean_cosine(embeds[0]), abs=1e-5)
        form = own.pop("choices_form")
        assert own == expected
    right = 0
    for row in rows:
        number = drawn[1].index(row["text"])
        wrong = embed_captions(model, tokenizer, row["choices"]) @ embeds[0][number]
        right += bool((wrong < embeds[1][number] @ embeds[0][number]).all())
    assert form == right / 15


def embed_as_a_rank(rank: int, port: int, results) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    seen = []
    vectors = embed_shares(lambda items: seen.append(len(items)) or torch.tensor(items)[:, None] * 1.0, list(range(7)))
    results.put((rank, seen, vectors.flatten().tolist()))
    dist.destroy_process_group()


def test_ranks_embed_equal_shares_and_all_get_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    ranks = [fork.Process(target=embed_as_a_rank, args=(rank, port, results)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    found = sorted(results.get() for _ in ranks)
    for rank in ranks:
        rank.join()
    assert found == [(rank, [3], [float(number) for number in range(7)]) for rank in range(3)]


def test_a_class_is_the_mean_of_its_sentences(loaded, embeds):
    templates, names = ["{}", "一张图，{}"], ["圆形", "方块", "十字"]
    scores = zero_shot(*loaded[:2], embeds[0], names, templates)
    for column, name in enumerate(names):
        sentences = embed_captions(*loaded[:2], [name, f"一张图，{name}"])
        assert torch.allclose(scores[:, column], embeds[0] @ normalize(sentences.mean(0), dim=0), atol=1e-6)


def test_the_command_measures_extracts_and_classifies(drawn, loaded, embeds, tmp_path, capsys):
    model, table = loaded[0].name_or_path, str(drawn[0] / "gallery.jsonl")
    features, results = str(tmp_path / "features.npz"), tmp_path / "results.json"
    main([model, "--data_path", table, "--extract", features, "--output", str(results)])
    assert "gallery: 12 pairs, 12 images, 12 captions\n  i2t_r1 " in capsys.readouterr().out
    recalls = retrieval_metrics(*embeds, range(12), range(12))
    assert json.loads(results.read_text())["eval_gallery/i2t_r5"] == recalls["i2t_r5"]
    with np.load(features) as found:
        assert found["image_embeds"] == pytest.approx(embeds[0].numpy(), abs=1e-5)
        assert found["text_embeds"] == pytest.approx(embeds[1].numpy(), abs=1e-5)
        assert found["texts"].tolist() == drawn[1] and found["sources"][2] == f"{table}:3"

    folder = tmp_path / "classes"
    for number in range(6):
        (folder / f"n{number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"n{number % 2}/{number}.png").write_bytes((drawn[0] / f"images/00{number}.png").read_bytes())
    (tmp_path / "classes.txt").write_text("n0\t圆形\nn1\t方块\n十字\n", encoding="utf-8")
    (tmp_path / "templates.txt").write_text("{}\n一张图，{}\n", encoding="utf-8")
    flags = ["--classes", str(tmp_path / "classes.txt"), "--templates", str(tmp_path / "templates.txt")]
    main([model, "--data_path", str(folder), *flags])
    scores = zero_shot(*loaded[:2], embeds[0][:6], ["圆形", "方块", "十字"], ["{}", "一张图，{}"])
    right = (scores.argmax(1) == torch.arange(6) % 2).double()
    printed = capsys.readouterr().out
    assert re.search(rf"  accuracy +{right.mean():.4f}\n", printed)
    assert re.search(rf"  accuracy 圆形 +{right[::2].mean():.4f}\n", printed)

    (tmp_path / "classes.txt").write_text("n0\nn2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"classes/n1/1.png: 'n1' is none of the 2 classes"):
        main([model, "--data_path", str(folder), *flags])
    (tmp_path / "templates.txt").write_text("{}\n\n一张图\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"templates.txt:3: {} must stand in a template once"):
        main([model, "--data_path", str(folder), *flags])
    two = shutil.copytree(drawn[0], tmp_path / "two")
    shutil.copyfile(two / "gallery.jsonl", two / "again.jsonl")
    with pytest.raises(SystemExit, match="--extract: .* has the galleries again, gallery; name one's file"):
        main([model, "--data_path", str(two), "--extract", features])


def test_infer_tells_the_likeliest_label_and_what_is_missing(drawn, loaded, embeds, tmp_path, capsys):
    model, image = loaded[0].name_or_path, str(drawn[0] / "images/002.png")
    names = ["圆形", "方块", "十字"]
    ask_infer([model, "--image", image, "--labels", *names])
    scores = zero_shot(*loaded[:2], embeds[0][2:3], names, ["{}"])[0]
    shares = probabilities(loaded[0], scores).tolist()
    lines = capsys.readouterr().out.splitlines()[1:]
    expected = sorted(zip(shares, scores.tolist(), names, strict=True), reverse=True)
    assert [line.split() for line in lines] == [
        [f"{share:.4f}", f"{score:.3f}", name] for share, score, name in expected
    ]
    assert sum(shares) == pytest.approx(1)
    (tmp_path / "run/checkpoint-5").mkdir(parents=True)
    for wrong, reason in (
        ([str(tmp_path / "run"), "--image", image], "config.json is not in this folder.* checkpoints: .*checkpoint-5"),
        ([str(tmp_path / "nothing"), "--image", image], "there is no such folder. Train first"),
        ([model, "--image", str(tmp_path / "no.png")], "no.png: can't be read: No such file"),
        ([model, "--image", __file__], "test_evaluate_retrieval.py: no picture of JPEG"),
    ):
        with pytest.raises(SystemExit, match=reason):
            ask_infer([*wrong, "--labels", *names])
