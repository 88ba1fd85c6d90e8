"""The default's data, its tower and its evaluation: the held-out stays unseen, each question has one right answer."""

import json
import random
import sys

import pytest
import torch
from ranks import RECIPE

sys.path.insert(0, str(RECIPE))

import data01_scenes  # noqa: E402
import evaluate_scenes  # noqa: E402
import pretrain_tower  # noqa: E402
import tiny  # noqa: E402
from files import UserError  # noqa: E402
from scenes import ATTRIBUTES, NAMES, TEMPLATES, describe, split_scenes  # noqa: E402


def read_table(folder):
    return json.loads((folder / "chat.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The default's data and the tuning data, of one picture a scene and a tenth of the scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data01_scenes, "VIEWS", 1)
        patch.setattr(data01_scenes, "EVAL_VIEWS", 1)
        patch.setattr(data01_scenes, "EMOJI_ROWS", 1)
        for fold in (0, 1):
            data01_scenes.write_data(folder / f"train{fold}", folder / f"eval{fold}", seed=0, fold=fold)
    return folder


@pytest.mark.parametrize("fold", [0, 1])
def test_held_out_scenes_stand_in_no_picture_and_no_answer_of_the_training(written, fold):
    _, seen = pretrain_tower.read_scenes(written / f"train{fold}/scenes.txt")
    _, held_out = pretrain_tower.read_scenes(written / f"eval{fold}/scenes.txt")
    assert (set(seen), set(held_out)) == tuple(map(set, split_scenes(0, fold))) and len(held_out) == 160
    said = {turn["value"] for row in read_table(written / f"train{fold}") for turn in row["conversations"]}
    descriptions = {describe(scene, template) for scene in held_out for template in TEMPLATES}
    assert len(descriptions) == 640 and not said & descriptions
    rng = random.Random(0)
    for _ in range(20):
        assert not set(pretrain_tower.draw_batch(sorted(set(seen)), rng)) & set(held_out)


def test_tuning_holds_out_others(written):
    first, second = (set(pretrain_tower.read_scenes(written / f"eval{fold}/scenes.txt")[1]) for fold in (0, 1))
    assert not first & second


def test_rows_are_read_as_they_were_meant(written):
    from rows import find_files, identify_files, read_rows

    files = find_files(str(written / "train0"))
    rows = list(read_rows(files, identify_files(files)[0]))
    assert len(rows) == 1440 + len(data01_scenes.read_emojis())
    assert {(row["error"], row["unused_keys"]) for row in rows} == {("", "[]")}
    truth = dict(zip(*pretrain_tower.read_scenes(written / "train0/scenes.txt"), strict=True))
    kinds = {question: name for name, questions in data01_scenes.QUESTIONS.items() for question in questions}
    turns = []
    for row, record in zip(rows, read_table(written / "train0"), strict=True):
        messages, (picture,) = json.loads(row["messages"]), json.loads(row["images"])
        assert messages[0]["content"].startswith("<image>\n") and picture[0].endswith(record["image"])
        scene, pairs = truth.get(record["image"]), list(zip(messages[::2], messages[1::2], strict=True))
        turns.append(len(pairs))
        for asked, reply in pairs if scene else ():
            question = asked["content"].removeprefix("<image>\n")
            if question in kinds:
                assert reply["content"] == data01_scenes.answer(scene, kinds[question])
            else:
                assert question in data01_scenes.DESCRIBE
                assert reply["content"] in {describe(scene, template) for template in TEMPLATES}
    assert {1, 3, 5} == set(turns) and turns.count(5) > 1000


def test_the_same_seed_gives_the_same_files_and_a_second_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        data01_scenes, "split_scenes", lambda seed, fold: [part[:20] for part in split_scenes(seed, fold)]
    )
    folders = [str(tmp_path / name) for name in ("train", "eval")]
    monkeypatch.setattr(sys, "argv", ["data01_scenes.py", *folders])
    data01_scenes.main()
    assert "eval: 40 rows" in capsys.readouterr().out
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    data01_scenes.main()
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    data01_scenes.write_data(tmp_path / "again", tmp_path / "again_eval", seed=0, fold=0)
    for path in (tmp_path / "again").rglob("*.*"):
        assert path.read_bytes() == files[tmp_path / "train" / path.relative_to(tmp_path / "again")][0]
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sys, "argv", ["data01_scenes.py", str(tmp_path / "mine"), folders[1]])
    with pytest.raises(SystemExit, match="mine: the folder is there and not from this program"):
        data01_scenes.main()


def test_the_tower_s_loss_counts_no_scene_twice_as_its_own_negative():
    torch.manual_seed(0)
    one, other = ("红", "圆形", "大", "一", "左边"), ("绿", "圆形", "大", "一", "左边")
    texts = [describe(scene, TEMPLATES[0]) for scene in (one, other)]
    model = pretrain_tower.DualEncoder(tiny.make_tower("levit"), sorted(set("".join(texts)))).eval()
    pixels = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        apart = model(pixels, texts, [one, other])
        together = model(pixels[[0, 0, 1]], [texts[0], texts[0], texts[1]], [one, one, other])
        logits = model.logit_scale.exp() * model.embed_images(pixels) @ model.embed_texts(texts).T
    wanted = [torch.nn.functional.cross_entropy(side, torch.arange(2), reduction="none") for side in (logits, logits.T)]
    assert apart == pytest.approx(torch.cat(wanted).mean().item(), rel=1e-5)
    of_three = sum(2 * side[0] + side[1] for side in wanted)
    # The other scene has one of the two as a negative twice.
    more = torch.logsumexp(torch.stack([logits[1, 0], logits[1, 0], logits[1, 1]]), 0) - logits[1].logsumexp(0)
    more = (
        more + torch.logsumexp(torch.stack([logits[0, 1], logits[0, 1], logits[1, 1]]), 0) - logits[:, 1].logsumexp(0)
    )
    assert together == pytest.approx(((of_three + more) / 6).item(), rel=1e-5)


def test_a_shifted_picture_is_the_picture_moved():
    picture = torch.zeros(1, tiny.SIDE, tiny.SIDE, 3)
    picture[0, 30, 40] = 1.0
    places = set()
    for seed in range(60):
        moved = pretrain_tower.shift(picture, random.Random(seed))
        assert moved.shape == picture.shape and moved.sum() == 3
        places.add(tuple((moved[0, :, :, 0].nonzero()[0] - torch.tensor([30, 40])).tolist()))
    assert {max(map(abs, place)) for place in places} == {0, 1, 2} and len(places) > 15


def test_the_tiny_model_is_built_once_by_what_it_is_made_of(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(tiny, "pretrain_tower", lambda *of: pretrain_tower.pretrain_tower(*of, steps=2))
    folder = tiny.tiny_model_folder(str(written / "train0"))
    stamp = (tmp_path / folder / "model.safetensors").stat().st_mtime_ns
    assert tiny.tiny_model_folder(str(written / "train0")) == folder
    assert (tmp_path / folder / "model.safetensors").stat().st_mtime_ns == stamp
    monkeypatch.setattr(tiny, "build_tiny_model", lambda *of: 1 / 0)  # as if killed
    with pytest.raises(ZeroDivisionError):
        tiny.tiny_model_folder(str(written / "train1"))
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder.rpartition("/")[2]]
    with pytest.raises(UserError, match="name a model"):
        tiny.tiny_model_folder("http://127.0.0.1:9/")


def test_the_tiny_tokenizer_has_a_token_for_each_character():
    tokenizer = tiny.character_tokenizer(["左边有四个 红色圆形", "A型血", "🐼é"])
    assert [tokenizer.decode([i]) for i in tokenizer("四个 A型🐼é红\n")["input_ids"]] == list("四个 A型🐼é红\n")
    ids = tokenizer("龘")["input_ids"]
    assert len(ids) == 3 and tokenizer.decode(ids) == "龘"
    messages = [
        {"role": "user", "content": "四个"},
        {"role": "assistant", "content": "红"},
        {"role": "user", "content": "圆"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>四个<|assistant|>红<|end|><|user|>圆<|assistant|>"
    assert len(tokenizer(text)["input_ids"]) == 9


def test_the_evaluation_counts_what_is_right(written, monkeypatch):
    """By a model that knows every colour, else says the first value, and is asked about grey as well."""
    truth = dict(zip(*pretrain_tower.read_scenes(written / "eval0/scenes.txt"), strict=True))
    kinds = {question: name for name, questions in data01_scenes.QUESTIONS.items() for question in questions}
    asked = []
    monkeypatch.setattr(evaluate_scenes, "open_picture", lambda path: truth.get(path.name, path.name))

    def reply(model, processor, conversations, max_new_tokens, temperature):
        assert temperature == 0
        replies = []
        for ((message,),) in ([conversation] for conversation in conversations):
            (picture,), question = message["images"], message["content"].removeprefix("<image>\n")
            asked.append((picture, question))
            scene = picture if isinstance(picture, tuple) else tuple(next(iter(of)) for of in ATTRIBUTES.values())
            name = kinds.get(question)
            if name is None:
                replies.append(describe(scene, TEMPLATES[2]) if question in data01_scenes.DESCRIBE else "熊猫")
            else:
                replies.append(data01_scenes.answer(scene if name == "colour" else list(truth.values())[0], name))
        return replies

    monkeypatch.setattr(evaluate_scenes, "reply_batch", reply)
    results = evaluate_scenes.evaluate_scenes(None, None, str(written / "eval0"))
    first, scenes = list(truth.values())[0], list(truth.values())
    shares = {name: sum(s[i] == first[i] for s in scenes) / len(scenes) for i, name in enumerate(NAMES)}
    assert {name: results["seen"][name] for name in NAMES} == shares | {"colour": 1.0}
    red = sum(scene[0] == "红" for scene in scenes) / len(scenes)
    assert {name: results["blind"][name] for name in NAMES} == shares | {"colour": red}
    assert results["blind"]["mean"] == pytest.approx(sum(results["blind"][name] for name in NAMES) / 5)
    assert results["seen"]["description"] == 1.0
    assert results["seen"]["emoji"] == pytest.approx(1 / len(data01_scenes.read_emojis()))
    assert len([one for one in asked if getattr(one[0], "size", None) == (64, 64)]) == 15
