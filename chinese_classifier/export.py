"""Turns a trained classifier into one plain folder: adapter merged into its base, safetensors, tokenizer; and ONNX.

    python export.py output exported                    for pipeline and AutoModelForSequenceClassification
    python export.py output exported --onnx             model.onnx too, for onnxruntime, with its speed beside PyTorch's

The folder is read again and its logits are compared, and so are those of model.onnx.
"""

import sys
import timeit
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from infer import find_base_model, load_trained_model, model_parser
from rows import UserError

PROBES = [
    "房间干净，服务员也热情。",
    "书的内容一般，印刷很差。",
    "好",
    "送货慢，包装破了，打电话也没有人接，不会再买。" * 4,
]


def encode_probes(tokenizer, texts: list[str] = PROBES):
    """What the model takes for texts of several lengths, padded to the longest."""
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt")


@torch.no_grad()
def probe_logits(model, inputs) -> torch.Tensor:
    """The model's logits, shape (texts, num_labels)."""
    return model(**inputs).logits


def export(path: str, target: str, trust_remote_code: bool = False) -> float:
    """Writes the model at `path`, its adapter merged in, as a plain folder `target`.

    Returns:
        The largest difference of a logit between the folder as written and what it was made of.

    Raises:
        UserError: no model at `path`, a target that is not empty, or a difference that rounding can't explain.
    """
    if Path(target).exists() and (Path(target).is_file() or any(Path(target).iterdir())):
        raise UserError(f"{target}: is not an empty folder. Name another one, or remove it first.")
    model, tokenizer = load_trained_model(path, trust_remote_code)
    expected = probe_logits(model.cpu(), encode_probes(tokenizer))
    if find_base_model(path) is not None:
        model = model.merge_and_unload()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    written = AutoModelForSequenceClassification.from_pretrained(target, trust_remote_code=trust_remote_code).eval()
    logits = probe_logits(written, encode_probes(AutoTokenizer.from_pretrained(target)))
    difference = (logits - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise UserError(f"{target}: its logits differ from those of {path} by up to {difference:.2e}. Do not use it.")
    return difference


def export_onnx(target: str, trust_remote_code: bool = False) -> tuple[float, float]:
    """Writes `target`/model.onnx of the model in the same folder, for any number of texts of any length.

    Returns:
        The largest difference of a logit between the two, and how many times as fast onnxruntime is on the CPU.

    Raises:
        UserError: the logits differ by more than rounding explains.
    """
    import onnxruntime

    model, tokenizer = load_trained_model(target, trust_remote_code)
    model.cpu()
    inputs = dict(encode_probes(tokenizer))
    file, dimensions = Path(target, "model.onnx"), {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        model,
        kwargs=inputs,
        f=file,
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(inputs, dimensions),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run_session(inputs) -> np.ndarray:
        return session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})[0]

    batches = [encode_probes(tokenizer, texts) for texts in (PROBES, PROBES[:1], PROBES[::-1] * 3)]
    difference = max(float(np.abs(run_session(one) - probe_logits(model, one).numpy()).max()) for one in batches)
    if not difference <= 1e-3:
        raise UserError(f"{file}: its logits differ from those of {target} by up to {difference:.2e}. Do not use it.")
    many = encode_probes(tokenizer, PROBES * 8)
    ways = (lambda: probe_logits(model, many), lambda: run_session(many))
    of_torch, of_onnx = np.min([[timeit.timeit(run, number=1) for run in ways] for _ in range(10)], axis=0)  # in turns
    return difference, float(of_torch / of_onnx)


def main(argv: list[str] | None = None) -> None:
    parser = model_parser(__doc__)
    parser.add_argument("target", help="folder to write, new or empty")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too (pip install onnx onnxscript)")
    args = parser.parse_args(argv)
    try:
        difference = export(args.model, args.target, args.trust_remote_code)
        print(f"{args.target}: written and read again; largest difference of a logit {difference:.2e}")
        if args.onnx:
            difference, ratio = export_onnx(args.target, args.trust_remote_code)
            print(
                f"{args.target}/model.onnx: largest difference {difference:.2e}, {ratio:.2f} times as fast as PyTorch"
            )
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
