"""What is exported has the logits of what it was made of."""

import contextlib
import io
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import pipeline

from conftest import make_reviews
from export import export, export_onnx, main
from infer import load_trained_model, predict_probabilities
from rows import UserError


@pytest.fixture(scope="module", params=["tiny", "bert"])
def exported(request, tiny_folder, telling_folder, tmp_path_factory):
    """The folder that the command line wrote, model.onnx in it, and what it printed."""
    target, printed = tmp_path_factory.mktemp("exported") / request.param, io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([tiny_folder if request.param == "tiny" else telling_folder, str(target), "--onnx"])
    return target, printed.getvalue()


def test_onnx_has_the_logits_of_pytorch(exported):
    target, printed = exported
    assert "times as fast as PyTorch" in printed
    model, tokenizer = load_trained_model(str(target))
    session = onnxruntime.InferenceSession(target / "model.onnx")
    for texts in ([text for text, _ in make_reviews(7, seed=4)], ["天"]):
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        logits = session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(**inputs).logits, atol=1e-5)


def test_pipeline_serves_the_folder_and_cuts_long_texts(exported):
    served = pipeline("text-classification", str(exported[0]), truncation=True)
    model, tokenizer = load_trained_model(str(exported[0]))
    texts = ["天地欢喜", "愤怒" * 1000]
    probabilities, cut = predict_probabilities(model, tokenizer, texts)
    assert cut.tolist() == [False, True]
    for answer, row in zip(served(texts), probabilities, strict=True):
        assert answer["score"] == pytest.approx(max(row), abs=1e-5)


def test_a_folder_that_holds_something_is_left_alone(tiny_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="is not an empty folder"):
        export(tiny_folder, str(tmp_path))


def test_a_broken_onnx_file_is_not_recommended(exported, monkeypatch):
    class Wrong(onnxruntime.InferenceSession):
        def run(self, *args, **kwargs):
            return [logits + 0.1 for logits in super().run(*args, **kwargs)]

    monkeypatch.setattr(torch.onnx, "export", lambda *args, f, **kwargs: Path(f).stat())  # it was written already
    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(UserError, match="its logits differ"):
        export_onnx(str(exported[0]))
