"""Each filter: what it drops, what it leaves, and that it can be switched off."""

import random
from dataclasses import replace

import numpy as np

from clean import BANDS, Filters, Judge, RecurringLines, Seen, document_keys, remove_lines, sign

OFF = Filters(False, 0, 1, 0, False, 0)
WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"


def make_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(WORDS, k=length))


def judge(texts: list[str], filters: Filters, split: float = 0, held_out: tuple[str, ...] = ()):
    """Fates, lines taken out, copies; of documents that come one by one, as in pieces of any size."""
    judge, found = Judge(filters, split, 42), ([], {}, {})
    if held_out:
        judge.decide(sign(list(held_out), filters)[1], True)
    for number, text in enumerate(texts):
        fates, *of_documents = judge.decide(sign([text], filters)[1], False)
        found[0].extend(fates)
        for whole, own in zip(found[1:], of_documents, strict=True):
            if own:
                whole[number] = own[0]
    return found


def shingles(text: str) -> set[str]:
    return {text[place : place + 5] for place in range(max(1, len(text) - 4))}


def test_control_characters_go_and_nothing_else():
    text = "a\x00b\x0b\r\nc\td\u200b\ufeff\x85 ，。“①Ａ﹏👨\u200d👩\u3000龘𠮷"
    assert sign([text], Filters())[0] == ["ab\nc\td ，。“①Ａ﹏👨\u200d👩\u3000龘𠮷"]
    assert sign([text], replace(Filters(), remove_control=False))[0] == [text]
    assert sign([text, "x"], Filters())[1].control == [6, 0]


def test_too_little_chinese():
    texts = ["English only, really.", "中文", "a中文字b c", "1998 年 1 月 1 日 00:00", "𠮷㐀豈", "？！", "   \n"]
    _, signed = sign(texts, Filters())
    assert signed.chinese.round(2).tolist() == [0, 1, 0.5, 0.21, 1, 0, 0]
    assert [bool(reason) for reason in signed.reasons] == [True, False, False, True, False, True, True]
    assert not any(sign(texts, OFF)[1].reasons)


def test_repeated_lines():
    rng = random.Random(0)
    menu = "首页\n新闻中心\n联系我们\n" * 5 + make_text(rng, 30)
    poem = "\n".join([make_text(rng, 7) for _ in range(8)] + ["白日依山尽"] * 2)
    _, signed = sign([menu, poem, "好" * 300], Filters())
    assert signed.reasons == ["repeated lines", "", ""]
    assert not any(sign([menu], OFF)[1].reasons)


def test_a_line_that_recurs_in_many_documents_is_taken_out():
    rng = random.Random(0)
    texts = [f"{make_text(rng, 50)}\n版权所有 请勿转载\n{make_text(rng, 50)}" for _ in range(30)]
    _, lines, _ = judge(texts, Filters())
    assert sorted(lines) == list(range(20, 30)) and len(lines[20]) == 1
    assert remove_lines(texts[25], lines[25]) == texts[25].replace("版权所有 请勿转载\n", "")
    assert not judge(texts, replace(Filters(), boilerplate_documents=0))[1]
    assert not judge(["\n".join(["同一行同一行"] * 2 + [make_text(rng, 90)])], Filters())[1]


def test_the_memory_of_lines_is_bounded_and_counts_are_never_too_high(monkeypatch):
    monkeypatch.setattr(RecurringLines, "CAPACITY", 100)
    lines, largest = RecurringLines(20), 0
    found = []
    for number in range(5000):
        found.append(lines.update([7, 1000 + number]))  # 7 stands in each, the others in one each
        largest = max(largest, len(lines.counts))
    assert largest <= 101 and all(own <= {7} for own in found)
    assert not any(found[:20]) and found[-1] == {7}


def test_exact_duplicates_but_for_white_space():
    texts = ["白日依山尽，\n黄河入海流。", "白日依山尽，黄河入海流。\n", "欲穷千里目", "白日", "白日", "白"]
    assert judge(texts, Filters())[0] == ["train", "duplicate", "train", "train", "duplicate", "train"]
    only_exact = replace(OFF, exact_duplicates=True)
    assert judge(texts, only_exact)[0] == ["train", "duplicate", "train", "train", "duplicate", "train"]
    assert judge(texts, OFF)[0] == ["train"] * 6


def test_near_duplicates_are_those_of_a_similarity_above_the_threshold():
    """Pairs of which some characters differ: dropped is what is at least as similar, by the true Jaccard index."""
    rng, wrong, seen = random.Random(1), 0, 0
    for _ in range(150):
        text = make_text(rng, 400)
        other = list(text)
        for place in rng.sample(range(400), rng.randint(0, 25)):
            other[place] = "龘"
        other = "".join(other)
        similarity = len(shingles(text) & shingles(other)) / len(shingles(text) | shingles(other))
        fates, _, copies = judge([text, other], Filters())
        if copies:
            assert copies[1][0] == 0 and abs(copies[1][1] - similarity) < 0.15
        if abs(similarity - 0.8) > 0.1:
            seen += 1
            wrong += (similarity > 0.8) != (fates[1] != "train")
    assert seen > 80 and wrong <= 1
    assert judge([text, text[:-1] + "龘"], replace(Filters(), near_duplicates=0))[0] == ["train", "train"]


def test_short_texts_are_their_own_shingles():
    """Under one empty signature, or an ASCII word pattern, they would all be copies of each other."""
    texts = ["好", "坏", "一二", "一二三四", "一二三五", "一二三四五", "啊啊啊啊啊啊啊", "啊啊啊啊啊"]
    fates, _, _ = judge(texts, Filters())
    assert fates[:7] == ["train"] * 7
    assert fates[7] == "near duplicate"  # of one shingle, the same as the text before it has


def test_a_piece_s_neighbours_do_not_matter():
    rng = random.Random(2)
    texts = [make_text(rng, rng.choice([1, 3, 4, 5, 6, 50, 500])) for _ in range(50)]
    together = document_keys(texts, True)
    alone = [document_keys([text], True) for text in texts]
    assert (together[0] == np.vstack([keys for keys, _ in alone])).all()
    assert (together[1] == np.concatenate([shares for _, shares in alone])).all()


def test_what_is_held_out_is_not_filtered_and_its_copies_do_not_stand_in_training():
    rng = random.Random(3)
    held_out = make_text(rng, 300)
    near = held_out[:150] + "龘" + held_out[151:]
    english = "Not a word of Chinese in it." * 3
    texts = [make_text(rng, 300), near, held_out, english]
    assert judge(texts, Filters(), held_out=(held_out, english, english))[0] == [
        "train",
        "copy of validation",
        "copy of validation",
        "too little Chinese",
    ]
    exact = replace(OFF, exact_duplicates=True)
    assert judge(texts, exact, held_out=(held_out, english))[0][2:] == ["copy of validation"] * 2


def test_a_split_is_by_content_and_without_leaks():
    rng = random.Random(4)
    texts = [make_text(rng, 200) for _ in range(400)] + ["English is held out as it is, if chance will have it."] * 50
    fates, _, _ = judge(texts, Filters(), split=0.2)
    chosen = {text for text, fate in zip(texts, fates, strict=True) if fate == "validation"}
    assert 55 < len(chosen) < 110
    more = [make_text(rng, 200) for _ in range(50)]
    shuffled = texts[:400] + more
    rng.shuffle(shuffled)
    again = judge(shuffled, Filters(), split=0.2)[0]
    on_the_side = {text for text, fate in zip(shuffled, again, strict=True) if fate == "validation"}
    assert on_the_side - set(more) == {text for text in chosen if text in texts[:400]}
    copies = [text[:100] + "龘" + text[101:] for text in sorted(chosen) if text in texts[:400]]
    assert set(judge(texts[:400] + copies, Filters(), split=0.2)[0][400:]) == {"copy of validation"}


def test_the_table_grows_and_finds_all(monkeypatch):
    monkeypatch.setattr(Seen, "ROWS", 64)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**64, (3000, 1 + BANDS), np.uint64)
    seen = Seen(1 + BANDS, True, 0.8)
    for row in rows:
        assert seen.find(row) is None
        seen.add(row)
    assert [seen.find(row) for row in rows] == [(number, 1.0) for number in range(3000)]
    assert len(seen.table) * 0.6 >= 3000 * 17 > len(seen.table) * 0.3
