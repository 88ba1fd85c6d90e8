"""The chat page of a Hugging Face Space; make_space.sh puts it beside demo.py and the model.

The Space's variables: MODEL, a hub id in place of the folder `model`; TITLE.
"""

import os

from demo import build_demo
from infer import load_trained_model

model, tokenizer = load_trained_model(os.environ.get("MODEL", "model"))
demo = build_demo(model, tokenizer, title=os.environ.get("TITLE", "多语言对话演示"))

if __name__ == "__main__":
    demo.launch(footer_links=[])
