"""The notebooks run from top to bottom in a folder that holds nothing but the recipe, and what they show is so.

They fit and train for fewer steps on a small part of the default corpus here; what the full training reaches is asked
by `make defaults`.
"""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbclient import NotebookClient
from ranks import RECIPE

SHORTER = [
    ("max_steps=50", "max_steps=4"),
    ("eval_steps=10", "eval_steps=2"),
    ("ROWS, LENGTH = 64", "ROWS, LENGTH = 12"),
]
FIT = "FIT_STEPS, CONTEXTS_PER_STEP = 400, "
WRITTEN_BY_RUNS = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", ".ipynb_checkpoints")
PART = {"news": 1500, "sanguo": 4, "idioms": 500, "words": 500}  # lines of the news, documents of the others


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe, and a part of the default corpus where the notebooks look for the whole."""
    import data01_collect
    import prepare
    import train_tokenizer

    folder = shutil.copytree(RECIPE, tmp_path_factory.mktemp("lessons") / "model_clm", ignore=WRITTEN_BY_RUNS)
    bigram = (folder / "bigram.py").read_text()
    assert FIT in bigram
    (folder / "bigram.py").write_text(bigram.replace(FIT, "FIT_STEPS, CONTEXTS_PER_STEP = 80, "))
    corpus, held_out = folder / "cache_data" / "corpus", folder / "cache_data" / "corpus_held_out"
    documents, texts = data01_collect.collect()
    documents["news"] = ["\n".join(documents["news"][0].split("\n")[: PART["news"]])]
    for source, own in documents.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in own[: PART[source]]]
        data01_collect.write(corpus / f"{source}.jsonl", "\n".join(lines) + "\n")
    for source, text in texts.items():
        data01_collect.write(held_out / f"{source}.txt", text[:3000])
    train_tokenizer.main([str(corpus), f"{corpus}_tokenizer", "--vocab_size", "2500"])
    flags = [str(corpus), f"{corpus}_prepared", "--tokenizer", f"{corpus}_tokenizer", "--document_separator", "file"]
    prepare.prepare(prepare.read_flags([*flags, "--validation_path", str(held_out)]))
    return folder


def execute(folder, name: str) -> str:
    """What a notebook shows as text; an error in a cell ends it all."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        for long, short in SHORTER:
            cell.source = cell.source.replace(long, short)
        cell.outputs = []
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    return "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)


@pytest.fixture(scope="module")
def shown(folder) -> dict[str, str]:
    """What each notebook shows. The first needs nothing of the others, and runs beside them."""
    with ThreadPoolExecutor() as pool:
        first = pool.submit(execute, folder, "code01_processdata")
        texts = {"code02_trainmodel": execute(folder, "code02_trainmodel")}
        (folder / "output_notebook").rename(folder / "output_zero2")
        texts["infer"] = execute(folder, "infer")  # with the model that code02 has trained
        return texts | {"code01_processdata": first.result()}


def test_texts_are_refused_or_cleaned_and_each_window_is_read_once(shown):
    text = shown["code01_processdata"]
    places = re.findall(r"^坏(?:文件|记录) +cache_data/lesson/broken/(\w+)\.", text, re.M)
    assert places == ["truncated", "binary", "mixed", "array", "long", "half", "keys"]
    assert "1 left out (near duplicate)" in text and "1 left out (copy of validation)" in text
    assert "used as it is" in text and "was prepared otherwise" in text
    checked = re.findall(r"(每个窗口恰好一次|每个窗口恰好读到一次|断点之后逐位相同)： ?True", text)
    assert len(checked) == 3
    targets, length, ends, documents = re.search(
        r"目标 ([\d,]+) 个 = 流长 ([\d,]+) − 1；其中 EOS (\d+) 个 = 文档 (\d+) 篇", text
    ).groups()
    assert int(targets.replace(",", "")) == int(length.replace(",", "")) - 1 and ends == documents


def test_bits_per_byte_are_the_trainers_and_the_start_is_a_bigram_model(shown):
    text = shown["code02_trainmodel"]
    bits, size, of_a_byte = map(float, re.search(r"([\d.]+) 比特 ÷ (\d+) 字节 = ([\d.]+)", text).groups())
    assert bits / size == pytest.approx(of_a_byte, abs=1e-3)
    assert "一行加起来 1.0000" in text
    assert float(re.search(r"最大相差 ([\d.e+-]+)（", text)[1]) < 1e-4
    random_start, bigram_start = map(float, re.search(r"随机的起点 ([\d.]+)，二元的起点 ([\d.]+)", text).groups())
    assert bigram_start < random_start - 0.5
    assert float(re.search(r"SVD \+ 400 步 +([\d.]+)", text)[1]) == pytest.approx(bigram_start, abs=2e-4)
    curves = {name: re.search(rf"^{name} start +(.+)$", text, re.M)[1].split() for name in ("bigram", "random")}
    assert [float(values[0]) for values in curves.values()] == [bigram_start, random_start]
    assert float(curves["random"][-1]) < random_start and float(curves["bigram"][-1]) < float(curves["random"][-1])
    by_hand, trainers = re.search(r"手算 ([\d.]+)，训练器报告的 ([\d.]+)", text).groups()
    assert float(by_hand) == pytest.approx(float(trainers), abs=2e-4) and float(trainers) < bigram_start + 0.05
    mixed = [float(value) for row in re.findall(r"^每字节比特数 +(.+?)(?: +\\)?$", text, re.M) for value in row.split()]
    assert len(mixed) == 11 and min(mixed) < min(mixed[0], mixed[-1])


def test_the_model_writes_on_and_the_heat_map_adds_up_to_its_score(shown):
    text = shown["infer"]
    assert re.search(r"^(?:.+\|){10}", text, re.M), "nothing came piece by piece"
    on_map, direct = re.search(r"热图上的数加起来 ([\d.]+)，按 token 直接加起来 ([\d.]+)", text).groups()
    assert float(on_map) == pytest.approx(float(direct), abs=1)  # two digits a character
    of_a_byte = {
        name: float(re.search(rf"^{name}(?: +[\d.]+){{3}} +([\d.]+)", text, re.M)[1]) for name in ("新闻", "打乱的新闻")
    }
    assert of_a_byte["新闻"] < of_a_byte["打乱的新闻"] - 0.5
    answers = re.findall(r"^页面： 话说天下大势，(.*)$", text, re.M)
    assert len(answers) > 2 and len(answers[-1].strip()) > 3, "the page gave no answer"
    assert "热图： 11 个字，" in text and "⚠️" not in text
    assert "Closing server" in text
