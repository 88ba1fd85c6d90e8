"""What is exported has the logits of what it was made of."""

import numpy as np
import pytest
import torch

from conftest import make_reviews
from export import export_classifier, export_onnx, main
from infer import load_trained
from rows import UserError


@pytest.mark.parametrize("kind", ["tiny", "bert"])
def test_onnx_has_the_logits_of_pytorch(kind, ngram_folder, classifier_folder, tmp_path, capsys):
    import onnxruntime

    target = tmp_path / "exported"
    main([ngram_folder if kind == "tiny" else classifier_folder, str(target), "--onnx"])
    assert "times as fast as PyTorch" in capsys.readouterr().out
    model, tokenizer = load_trained(str(target))
    session = onnxruntime.InferenceSession(target / "model.onnx")
    for texts in ([text for text, _ in make_reviews(7, seed=4)], ["天"]):
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        logits = session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(**inputs).logits, atol=1e-5)


def test_a_folder_that_holds_something_is_left_alone(ngram_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="is not an empty folder"):
        export_classifier(ngram_folder, str(tmp_path))


def test_a_broken_onnx_file_is_not_recommended(ngram_folder, tmp_path, monkeypatch):
    import onnxruntime

    export_classifier(ngram_folder, str(tmp_path / "exported"))

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *args, **kwargs):
            return [logits + 0.1 for logits in super().run(*args, **kwargs)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(UserError, match="its logits differ"):
        export_onnx(str(tmp_path / "exported"))
