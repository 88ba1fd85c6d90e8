"""Single texts, many texts and whole tables get the same answers, in their own order."""

import json
import re
import shutil

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
from rows import UserError, write_csv

TEXTS = [text for text, _ in make_reviews(40, seed=3)]


@pytest.fixture(scope="module")
def loaded(telling_folder):
    return load_trained_model(telling_folder)


@pytest.mark.parametrize("max_tokens", [1, 100, 100_000])
def test_many_texts_get_what_each_gets_alone(loaded, max_tokens):
    model, tokenizer = loaded
    done = []
    together, cut = predict_probabilities(model, tokenizer, TEXTS, max_tokens, done.append)
    assert together.shape == (40, 2) and sum(done) == 40 and not cut.any()
    np.testing.assert_allclose(together.sum(1), 1, rtol=1e-5)
    for text, row in zip(TEXTS, together, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0]
        np.testing.assert_allclose(row, alone, atol=1e-5)
    assert (together.argmax(1) == [0, 1] * 20).mean() > 0.9


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
    assert rank_classes(loaded[0], predict_probabilities(*loaded, [text])[0][0])[0][0] == "好评"
    assert max(words, key=lambda word: word[1])[0] == "欢喜" and max(weight for _, weight in words) > 0


def test_a_table_keeps_its_columns_and_rows(loaded, tmp_path):
    path = write_table(
        tmp_path / "table.csv",
        [("001", TEXTS[0], "", "x"), ("002", " ", "b", "y"), ("NA", TEXTS[1], "c", "z")],
        header=("id", "评论", "note", "last"),
    )
    table = read_texts(path, "评论")
    result = classify_table(*loaded, table, "评论")
    assert list(result) == ["id", "评论", "note", "last", "predicted", "probability", "cut"]
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
    assert (
        "20 rows, the new columns are predicted, probability, cut\n0 of them have no text; 0 are longer" in screen.out
        and "of the 20 rows with a label got it right" in screen.out
    )
    assert "20/20" in screen.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "a,b\n1,2\n",
            "no column 'text'; there are a, b. Name yours by --text_column and --label_column",
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


def test_columns_of_the_user_are_kept_and_what_was_cut_is_marked(loaded, tmp_path, capsys, monkeypatch):
    rows = [(TEXTS[0], "人工", "0.5"), ("天" * 100 + "\r" + "地", "", "")]
    file = tmp_path / "a.csv"
    write_csv(pd.DataFrame(rows, columns=["text", "predicted", "probability"]), file)
    monkeypatch.setattr(infer, "load_trained_model", lambda *args: loaded)
    infer.main(["model", "--file", str(file), "--output", str(tmp_path / "b.csv")])
    assert (
        "the new columns are predicted_2, probability_2, cut\n0 of them have no text; 1 are longer"
        in capsys.readouterr().out
    )
    written = read_texts(str(tmp_path / "b.csv"), "text")
    assert list(zip(written.text, written.predicted, written.probability, strict=True)) == rows
    assert written.predicted_2.isin(["好评", "差评"]).all() and written.cut.tolist() == ["False", "True"]
    for output in ("a.csv", "b.tsv", "no/folder.csv"):
        with pytest.raises(SystemExit, match="is the table itself|is no .csv in a folder that exists"):
            infer.main(["model", "--file", str(file), "--output", str(tmp_path / output)])


def test_the_beginning_of_a_very_long_text_is_explained(loaded, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        infer, "predict_probabilities", lambda *args: asked.append(args[2]) or predict_probabilities(*args)
    )
    infer.classify_text(*loaded, "天地玄黄" * 5000)
    assert len(asked[0][0]) == 20_000 and max(map(len, asked[1])) == 2000
    notes = "note: longer than 64 tokens, its end was cut\n"
    notes += "note: 20,000 characters, of which the first 2,000 are explained\n"
    assert capsys.readouterr().out.endswith(notes)


@pytest.mark.parametrize("order", [("0", "1"), ("1", "0")])
def test_classes_are_named_by_their_ids_whatever_else_the_file_says(order, telling_folder, tmp_path):
    folder = shutil.copytree(telling_folder, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["id2label"] = {number: {"0": "赞", "1": "贬"}[number] for number in order}
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = load_trained_model(str(folder))
    assert list(model.config.id2label.items()) == [(0, "赞"), (1, "贬")] and model.config.label2id == {"赞": 0, "贬": 1}
    assert rank_classes(model, predict_probabilities(model, tokenizer, ["天地欢喜"])[0][0])[0][0] == "赞"


def test_labels_are_compared_as_training_reads_them(loaded, tmp_path, capsys, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(infer, "load_trained_model", lambda *args: (model, tokenizer))
    monkeypatch.setattr(model.config, "id2label", {0: "1", 1: "0"})
    rows = [(text, {"好评": "1.0", "差评": " 0"}[label]) for text, label in make_reviews(20)]
    path = write_table(tmp_path / "a.csv", [*rows, ("", "1")], header=("text", " label"))
    infer.main(["model", "--file", path, "--output", str(tmp_path / "out.csv")])
    screen = capsys.readouterr().out
    assert "\n1 of them have no text" in screen
    right, labelled = re.search(r"([\d.]+) of the (\d+) rows with a label got it right", screen).groups()
    assert float(right) >= 0.9 and labelled == "20"


def test_a_table_without_any_text(loaded):
    table = pd.DataFrame({"text": ["", " "]})
    assert classify_table(*loaded, table, "text").predicted.tolist() == ["", ""]


def test_large_tables_are_tokenised_in_parts(loaded, monkeypatch):
    table = pd.DataFrame({"text": TEXTS})
    expected = predict_probabilities(*loaded, TEXTS)[0].max(1).round(4)
    monkeypatch.setattr(infer, "CHUNK", 7)
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
