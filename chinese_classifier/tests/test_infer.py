"""Single texts, many texts and whole tables get the same answers, in their own order."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

import infer
from conftest import make_reviews, write_table
from infer import (
    classify_table,
    cut_into_batches,
    explain,
    load_trained_model,
    predict_probabilities,
    rank_classes,
    read_texts,
)
from rows import UserError

TEXTS = [text for text, _ in make_reviews(40, seed=3)]


@pytest.fixture(scope="module")
def loaded(ngram_folder):
    return load_trained_model(ngram_folder)


@pytest.mark.parametrize("max_tokens", [1, 100, 100_000])
def test_many_texts_get_what_each_gets_alone(loaded, max_tokens):
    model, tokenizer = loaded
    done = []
    together = predict_probabilities(model, tokenizer, TEXTS, max_tokens, done.append)
    assert together.shape == (40, 2) and sum(done) == 40
    np.testing.assert_allclose(together.sum(1), 1, rtol=1e-5)
    for text, row in zip(TEXTS, together, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0]
        np.testing.assert_allclose(row, alone, atol=1e-5)
    assert (together.argmax(1) == [1, 0] * 20).mean() > 0.9


def test_batches_hold_each_row_once_and_no_more_tokens_than_allowed():
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    batches = cut_into_batches(lengths, 1024)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert max(lengths[batch].max() * len(batch) for batch in batches) <= 1024
    assert [len(batch) for batch in cut_into_batches(np.array([5000, 2]), 1024)] == [1, 1]


def test_the_words_that_decided_are_those_that_tell_the_class(loaded):
    text = "天地欢喜玄黄宇宙"
    words = explain(*loaded, text)
    assert "".join(word for word, _ in words) == text
    assert rank_classes(loaded[0], predict_probabilities(*loaded, [text])[0])[0][0] == "好评"
    assert max(words, key=lambda word: word[1])[0] == "欢喜" and max(weight for _, weight in words) > 0.2


def test_a_table_keeps_its_columns_and_rows(loaded, tmp_path):
    path = write_table(
        tmp_path / "table.csv",
        [("001", TEXTS[0], "", "x"), ("002", " ", "b", "y"), ("NA", TEXTS[1], "c", "z")],
        header=("id", "评论", "note", "last"),
    )
    table = read_texts(path, "评论")
    result = classify_table(*loaded, table, "评论")
    assert list(result) == ["id", "评论", "note", "last", "predicted", "probability"]
    assert result.id.tolist() == ["001", "002", "NA"] and result.note.tolist() == ["", "b", "c"]
    assert result.predicted.tolist() == ["好评", "", "差评"]
    assert result.probability.isna().tolist() == [False, True, False]


@pytest.mark.parametrize(("encoding", "delimiter"), [("utf-8-sig", ","), ("gb18030", ","), ("gb18030", "\t")])
def test_files_from_excel_are_classified(encoding, delimiter, loaded, tmp_path, capsys, monkeypatch):
    rows = ["编号,评论,星级", *(f"{number},{text},{label}" for number, (text, label) in enumerate(make_reviews(20)))]
    file, output = tmp_path / "a.csv", tmp_path / "out.csv"
    file.write_bytes("\r\n".join(rows).replace(",", delimiter).encode(encoding))
    monkeypatch.setattr(infer, "load_trained_model", lambda *args: loaded)
    flags = ["--file", file, "--output", output, "--text_column", "评论", "--label_column", "星级"]
    infer.main(["model", *map(str, flags)])
    written = pd.read_csv(output)
    assert output.read_bytes().startswith(b"\xef\xbb\xbf"), "Excel takes it for another encoding"
    assert (written.predicted == written.星级).mean() >= 0.9
    screen = capsys.readouterr()
    assert "20 rows; 0 of them have no text" in screen.out and "of the 20 rows with a label got it right" in screen.out
    assert "20/20" in screen.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "a,b\n1,2\n",
            "no column 'text', or more than one; there are a, b. Name yours by --text_column and --label_column",
        ),
        ("text,b\n1,2\n1,2,3\n", "a.csv:3: 3 cells, the header has 2"),
        ("text,b\n1,2,\n", "a.csv:2: 3 cells, the header has 2"),
        ('text,b\n1,2\n"1,2\n', "a.csv:3: the row that begins here has broken quotes"),
        ("", "there are none"),
        ("text,b\n", "there is no row in it"),
    ],
)
def test_tables_that_cannot_be_read_are_named(content, reason, loaded, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text(content)
    monkeypatch.setattr(infer, "load_trained_model", lambda *args: loaded)
    with pytest.raises(SystemExit, match=reason):
        infer.main(["model", "--file", str(tmp_path / "a.csv"), "--output", str(tmp_path / "out.csv")])


def test_labels_are_compared_as_training_reads_them(loaded, tmp_path, capsys, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(infer, "load_trained_model", lambda *args: (model, tokenizer))
    monkeypatch.setattr(model.config, "id2label", {0: "0", 1: "1"})
    rows = [(text, {"好评": "1.0", "差评": " 0"}[label]) for text, label in make_reviews(20)]
    path = write_table(tmp_path / "a.csv", [*rows, ("", "1")], header=("text", " label"))
    infer.main(["model", "--file", path, "--output", str(tmp_path / "out.csv")])
    screen = capsys.readouterr().out
    assert "21 rows; 1 of them have no text" in screen
    right, labelled = re.search(r"([\d.]+) of the (\d+) rows with a label got it right", screen).groups()
    assert float(right) >= 0.9 and labelled == "20"


def test_a_table_without_any_text(loaded):
    table = pd.DataFrame({"text": ["", " "]})
    assert classify_table(*loaded, table, "text").predicted.tolist() == ["", ""]


def test_large_tables_are_tokenised_in_parts(loaded, monkeypatch):
    monkeypatch.setattr(infer, "CHUNK", 7)
    table = pd.DataFrame({"text": TEXTS})
    expected = predict_probabilities(*loaded, TEXTS).max(1).round(4)
    np.testing.assert_allclose(classify_table(*loaded, table, "text").probability, expected, atol=2e-4)


def test_one_text_on_the_command_line(loaded, capsys, monkeypatch):
    monkeypatch.setattr(infer, "load_trained_model", lambda *args: loaded)
    infer.main(["model", "--text", "天地欢喜"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["好评", "差评"] and "欢喜 +" in lines[2]
    with pytest.raises(SystemExit, match="there is nothing in it"):
        infer.main(["model", "--text", " "])


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load_trained_model(str(tmp_path / "nothing"))
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="its checkpoints: .*checkpoint-3"):
        load_trained_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no model could be read there"):
        load_trained_model(str(tmp_path))
