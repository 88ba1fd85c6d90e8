"""A tiny LLaVA and a handful of conversations about pictures."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from ranks import RECIPE  # which sets the number of threads before torch is imported

sys.path.insert(0, str(RECIPE))

WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"


def make_rows(count: int, folder: Path, seed: int = 0) -> list[dict]:
    """Rows of 1 to 3 exchanges and 5 to 40 characters a message; of four, one has two pictures and one has none.

    The pictures, a colour and some noise, are written into `folder`.
    """
    rng = random.Random(seed)

    def say():
        return "".join(rng.choices(WORDS, k=rng.randint(5, 40)))

    rows = []
    for index in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
        names = [f"{seed}_{index}_{number}.png" for number in range((1, 2, 1, 0)[index % 4])]
        for name in names:
            noise = np.random.default_rng([seed, index, len(name)]).integers(0, 60, (48, 64, 3), dtype=np.uint8)
            colour = np.array([rng.randrange(196) for _ in range(3)], np.uint8)
            Image.fromarray(noise + colour).save(folder / name)
        messages[0]["content"] = "<image>" * len(names) + messages[0]["content"]
        rows.append({"messages": messages, "images": names} if names else {"messages": messages})
    return rows


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(data_path, **changed) -> SimpleNamespace:
    """What `load_splits` reads of DataArguments."""
    return SimpleNamespace(
        **{
            "data_path": str(data_path),
            "eval_data_path": None,
            "validation_split": 0.2,
            "model_max_length": 2048,
            "skip_bad_rows": False,
        }
        | changed
    )


def save_tiny_model(folder: Path, tower: str) -> str:
    from tiny import build_tiny_model

    build_tiny_model([WORDS], str(folder), tower)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A saved tiny LLaVA whose tower is a ViT: a batch gives what its parts give."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "vit")


@pytest.fixture(scope="session")
def levit_folder(tmp_path_factory) -> str:
    """One whose tower has batch norms."""
    return save_tiny_model(tmp_path_factory.mktemp("levit"), "levit")


@pytest.fixture(scope="session")
def processor(tiny_folder):
    from model import load_processor

    return load_processor(tiny_folder)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> str:
    """25 training rows: with 8 rows a step the last step has a single one, so that a second rank has none."""
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder / "train.jsonl", make_rows(25, folder))


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory) -> str:
    """Three validation rows, the last without a picture."""
    folder = tmp_path_factory.mktemp("eval")
    rows = make_rows(4, folder, seed=1)
    return write_rows(folder / "eval.jsonl", [rows[0], rows[1], rows[3]])


@pytest.fixture(scope="session")
def chat(tiny_folder):
    """A model that says something else at each step and of each picture, and never ends by itself."""
    import torch
    from served import CONTEXT

    from infer import load_trained_model

    model, processor = load_trained_model(tiny_folder)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.2, generator=generator)
    model.config.text_config.max_position_embeddings = CONTEXT
    model.generation_config.suppress_tokens += [processor.tokenizer.eos_token_id]
    return model, processor


@pytest.fixture(scope="session")
def server(chat):
    """Its address and its state."""
    from served import KEY, serve

    from app import create_app

    limits = {"max_input_tokens": 200, "max_new_tokens": 10000, "max_queue": 1, "max_images": 3, "max_pixels": 10_000}
    application = create_app(*chat, "tiny", KEY, **limits, max_body_bytes=4 << 20)
    with serve(application) as address:
        yield SimpleNamespace(address=address, state=application.state)


@pytest.fixture
def client(server):
    """The openai package, as its users have it."""
    import openai
    from served import KEY

    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client
