"""Which language a row is in: by its file's name for training, by its text for raw data."""

import re
from pathlib import Path

LANGUAGES = {"zh": "中文", "en": "English", "code": "code", "fr": "français", "es": "español"}

CHINESE = re.compile(r"[\u3400-\u9fff]")
KANA = re.compile(r"[\u3040-\u30ff]")
CODE = re.compile(
    r"^\s*(?:def |class |import |from \w+ import |function |const |let |var |SELECT |INSERT |UPDATE |CREATE "
    r"|#include|#define|public |[\w.]+ = |for \(|while \(|if \(|print\(|console\.log|\$ |#!/|curl |grep |return "
    r"|echo [\"$]|(?:for|while|if) .*(?:[;:]|; (?:do|then))$|[a-z]+ --?\w|(?:cat|cp|mv|rm|chmod|find) [\w+./~-]*[./+])"
    r"|[;{}]\s*$|\)\s*:\s*$|=>",
    re.MULTILINE,
)
WORD = re.compile(r"[a-zß-öø-ÿœ]+")
COMMON_WORDS = {
    "en": " the of and to is in that it for are with as you be this on what how a an not can do they but or why ",
    "fr": " le la les des est une un et du dans que pour qui au sur avec ce il elle en pas vous quel ",
    "es": " el la los las es una un y del en que para por con se su no más como qué cuál quién fue lo al ",
    # known as neighbours that are none of the above
    "pt": " o os as um uma não que do da dos das em para com no na se é são você mais como qual ",
    "it": " il lo gli di che è un una per non con del della sono si nel come quale ",
    "de": " der die das und ist nicht ein eine zu den von mit wie was für sich auf ",
}


def language_of(source: str) -> str:
    """The tag of a row by its source, `folder/zh.jsonl:12`; "other" where the file's name is no tag."""
    name = Path(source.rpartition(":")[0]).name.split(".")[0]
    return name if name in LANGUAGES else "other"


def detect_language(question: str, answer: str) -> str:
    """A tag of LANGUAGES, or "other": code by the answer's lines, Chinese by characters, others by common words."""
    if len(CODE.findall(answer)) * 4 >= answer.count("\n") + 1:
        return "code"
    text = f"{question}\n{answer}".lower()
    words = WORD.findall(text)
    chinese = len(CHINESE.findall(text))
    if chinese > len(words) / 2:
        return "zh" if chinese > len(KANA.findall(text)) else "other"
    counts = {tag: sum(f" {word} " in common for word in words) for tag, common in COMMON_WORDS.items()}
    best = max(counts, key=counts.get)
    return best if best in LANGUAGES and counts[best] >= max(1, len(words) / 20) else "other"
