"""Translates the captions of a table into Chinese, by any server that speaks OpenAI's /v1/chat/completions.

    python code04_transdata.py my_pairs.jsonl my_pairs_zh.jsonl --base_url http://localhost:8000/v1 --model qwen

Each row gets its `zh_prompt`; rows that have one stay as they are. A key, where the server wants one, is read from the
environment (OPENAI_API_KEY). Every answer is written at once beside the output (`...answers.jsonl`), so a run that was
stopped, however, asks for nothing twice; equal captions are asked for once. The output appears when it is complete.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import httpx
from filelock import FileLock, Timeout

from files import UserError, identify_file, list_files, read_records

CAPTION_KEYS = ("prompt", "text", "caption")
PROMPT = "你是翻译。把用户给出的图片描述翻译成一句通顺的中文，只回答译文，不要解释。"
CHINESE = re.compile("[\u3400-\u9fff]")
TRY_AGAIN = {408, 409, 425, 429}


def read_table(path: str, key: str | None) -> list[tuple[str, dict, str]]:
    """(`file:line`, record, the key of its caption) of each row.

    Raises:
        UserError: a row that is no object, or has no caption.
    """
    rows = []
    for file in list_files(path):
        for number, record, _ in read_records(file, identify_file(file)[0]):
            source = f"{file}:{number}"
            if isinstance(record, UserError) or not isinstance(record, dict):
                raise UserError(f"{source}: {record if isinstance(record, UserError) else 'no JSON object'}")
            name = key or next((name for name in CAPTION_KEYS if record.get(name)), None)
            texts = record.get(name) if name else None
            texts = texts if isinstance(texts, list) else [texts]
            if not record.get("zh_prompt") and not all(isinstance(text, str) and text.strip() for text in texts):
                raise UserError(f"{source}: no caption under {key or ', '.join(CAPTION_KEYS)}")
            rows.append((source, record, name))
    return rows


def captions_of(record: dict, key: str) -> list[str]:
    return record[key] if isinstance(record[key], list) else [record[key]]


def read_answers(path: Path) -> dict[str, str]:
    """Caption -> translation as far as they are known; a line that a killed run left unfinished is taken away."""
    path.touch()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    return dict(json.loads(line) for line in whole.splitlines())


def check_answer(text: str, answer: str) -> str:
    """The translation on one line, without quotation marks around it; raises ValueError where it is none."""
    answer = " ".join(answer.split())
    if len(answer) > 1 and answer[0] + answer[-1] in ('""', "“”", "「」", "''"):
        answer = answer[1:-1].strip()
    if not answer or (re.search("[A-Za-z]{2}", text) and not CHINESE.search(answer)):
        raise ValueError(f"the answer isn't Chinese: {answer[:60]!r}")
    return answer


def translate(client: httpx.Client, model: str, text: str, retries: int) -> str:
    """The server's translation of a caption.

    Tried again, each time twice as long after, where the server is busy, fails, can't be reached or answers nonsense.

    Raises:
        UserError: the server refuses (a wrong key, model or address).
        ValueError, httpx.HTTPError: it still failed at the last try.
    """
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]
    for attempt in range(retries + 1):
        wait = 0.5 * 2**attempt
        try:
            response = client.post("chat/completions", json={"model": model, "messages": messages, "temperature": 0})
            if 400 <= response.status_code < 500 and response.status_code not in TRY_AGAIN:
                raise UserError(f"{response.url} answers {response.status_code}: {response.text[:300]}")
            asked_to_wait = response.headers.get("retry-after", "")
            wait = float(asked_to_wait) if asked_to_wait.replace(".", "", 1).isdecimal() else wait
            response.raise_for_status()
            return check_answer(text, response.json()["choices"][0]["message"]["content"] or "")
        except UserError:
            raise
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            if attempt == retries:
                raise ValueError(f"{type(error).__name__}: {error}") from None
            time.sleep(min(wait, 60))


def translate_all(flags, texts: list[str], answers: dict[str, str], answer_file: Path) -> Iterator[tuple[str, str]]:
    """Asks for the texts without an answer, `flags.concurrency` at once; yields (text, reason) of those that failed.

    Args:
        answers: grows by each answer as it comes, and so does the file.
    """
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    address = flags.base_url.rstrip("/") + "/"
    started, asked = time.monotonic(), 0
    with (
        httpx.Client(base_url=address, headers=headers, timeout=flags.timeout) as client,
        ThreadPoolExecutor(flags.concurrency) as pool,
        answer_file.open("a", encoding="utf-8") as file,
    ):
        for start in range(0, len(texts), flags.chunk_size):
            chunk = texts[start : start + flags.chunk_size]
            futures = {pool.submit(translate, client, flags.model, text, flags.retries): text for text in chunk}
            for future in as_completed(futures):
                text = futures[future]
                try:
                    answers[text] = future.result()
                except (UserError, KeyboardInterrupt):
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                except ValueError as error:
                    yield text, str(error)
                    continue
                file.write(json.dumps([text, answers[text]], ensure_ascii=False) + "\n")
                file.flush()
            asked += len(chunk)
            rate = asked / (time.monotonic() - started)
            print(f"{asked:,} of {len(texts):,} captions, {rate:.1f} a second", file=sys.stderr, flush=True)


def write_output(path: Path, rows: list[tuple[str, dict, str]], answers: dict[str, str]) -> int:
    """Writes the rows in their order, all at once; returns how many were left out, for want of a translation."""
    left_out, scratch = 0, Path(f"{path}.part")
    with scratch.open("w", encoding="utf-8") as file:
        for _, record, key in rows:
            if not record.get("zh_prompt"):
                found = [answers.get(text) for text in captions_of(record, key)]
                if None in found:
                    left_out += 1
                    continue
                record = record | {"zh_prompt": found if isinstance(record[key], list) else found[0]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(scratch, path)
    return left_out


def run(flags) -> str:
    """Translates a table; returns what was done.

    Raises:
        UserError: some captions couldn't be translated, and were not to be left out.
    """
    rows, output = read_table(flags.input, flags.key), Path(flags.output)
    if output.exists():
        raise UserError(f"{output} is there already; name another file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    answer_file = Path(f"{output}.answers.jsonl")
    try:
        with FileLock(f"{output}.lock", timeout=0):
            answers = read_answers(answer_file)
            todo = [text for _, record, key in rows if not record.get("zh_prompt") for text in captions_of(record, key)]
            todo = [text for text in dict.fromkeys(todo) if text not in answers]
            failed = dict(translate_all(flags, todo, answers, answer_file))
            if failed and not flags.skip_failed:
                text, reason = next(iter(failed.items()))
                source = next(source for source, record, key in rows if key and text in captions_of(record, key))
                raise UserError(
                    f"{len(failed)} captions have no translation, the first: {source}: {reason}\nThe others are kept. "
                    "Run it again to ask for these alone, or leave their rows out by --skip_failed."
                )
            left_out = write_output(output, rows, answers)
    except Timeout:
        raise UserError(f"{output}: another process is translating into it.") from None
    return f"{output}: {len(rows) - left_out:,} rows, {left_out:,} left out, {len(todo):,} captions asked for"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a table, or a folder of them")
    parser.add_argument("output", help="the .jsonl to write")
    parser.add_argument("--base_url", default="http://localhost:8000/v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--key", help=f"the captions' key; else the first of {', '.join(CAPTION_KEYS)}")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once")
    parser.add_argument("--chunk_size", type=int, default=1000, help="captions between two lines on the screen")
    parser.add_argument("--retries", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for an answer")
    parser.add_argument("--skip_failed", action="store_true", help="leave out rows that can't be translated")
    try:
        print(run(parser.parse_args()))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
