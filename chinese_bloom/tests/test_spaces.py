"""The folder of a Space starts by itself, as the Hub would start it, and its page answers."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from gradio_client import Client
from ranks import RECIPE
from torch.distributed.elastic.utils.distributed import get_free_port


@pytest.fixture(scope="module")
def space(tiny_folder, tmp_path_factory):
    """Made of relative paths, called from another folder."""
    folder = tmp_path_factory.mktemp("spaces")
    (folder / "trained").symlink_to(tiny_folder)
    environment = os.environ | {"MODEL": "trained", "OUTPUT": "my space"}
    command = ["bash", RECIPE / "make_space.sh"]
    made = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return folder / "my space"


def test_the_app_starts_and_answers(space):
    port = get_free_port()
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                client = Client(f"http://127.0.0.1:{port}", verbose=False)
                break
            except Exception:  # gradio's client raises what its HTTP library does while nobody listens
                assert app.poll() is None and time.monotonic() < deadline, "the page didn't come up"
                time.sleep(0.5)
        client.predict("你好", api_name="/ask")
        *_, history = client.submit("", 8, 0, 0.8, api_name="/reply")
        assert [message["role"] for message in history] == ["user", "assistant"]
        assert "生成失败" not in history[-1]["content"][0]["text"]
    finally:
        app.terminate()
        app.wait(timeout=20)


def test_the_front_matter_is_what_the_hub_asks_for(space):
    """https://huggingface.co/docs/hub/spaces-config-reference"""
    _, front_matter, _ = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front_matter)
    assert (settings["sdk"], (space / settings["app_file"]).name) == ("gradio", "app.py")
    recipe = (Path(RECIPE) / "requirements.txt").read_text()
    lowest = re.search(r"^gradio>=([\d.]+)", recipe, re.MULTILINE)[1]
    assert settings["sdk_version"].startswith(lowest)
    assert len((space / "requirements.txt").read_text().splitlines()) == 5
