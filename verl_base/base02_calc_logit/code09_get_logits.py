"""A model in two halves gives the logits of the whole model, also after a checkpoint; a rank holds one half only.

python -m base02_calc_logit.code09_get_logits
"""

import json
from pathlib import Path

from cluster import local_cluster  # before Ray and verl: they read the environment that it sets

# isort: split
from base01_worker_and_ray.tiny_model import save_tiny_model
from base02_calc_logit.logits import (
    largest_difference,
    make_batch,
    plain_log_probs,
    plain_logits,
    sharded_log_probs,
    sharded_logits,
    start_workers,
    train_one_step,
)

OUTPUT = Path("output_base02").resolve()  # the workers get absolute paths
model, checkpoint = str(OUTPUT / "model"), OUTPUT / "checkpoint"
save_tiny_model(model)
batch = make_batch()
mask, response_mask = batch.batch["attention_mask"], batch.batch["response_mask"]
logits = plain_logits(model, batch)  # [rows, length, vocabulary]
log_probs = plain_log_probs(logits, batch.batch["responses"])  # [rows, response length]

with local_cluster(2, OUTPUT) as pool:
    workers = start_workers(pool, model)
    for rank, size in enumerate(workers.count_bytes()):
        print(f"rank {rank} holds {size['held']:,} of {size['all']:,} bytes of parameters")
        assert size["held"] == size["all"] / 2

    differences = {
        "logits, sharded - plain": largest_difference(sharded_logits(workers, batch), logits, mask),
        "log-probs, sharded - plain": largest_difference(sharded_log_probs(workers, batch), log_probs, response_mask),
    }
    loss = train_one_step(workers, batch)
    print(f"one step of training, from loss {loss:.4f}: the weights are no longer those of the model's folder")
    trained = sharded_logits(workers, batch)
    moved = largest_difference(trained, logits, mask)
    workers.save_checkpoint(str(checkpoint))
    workers.reset()  # back to the weights of the model's folder
    differences["logits, reset - plain"] = largest_difference(sharded_logits(workers, batch), logits, mask)
    workers.load_checkpoint(str(checkpoint))
    differences["logits, loaded - saved"] = largest_difference(sharded_logits(workers, batch), trained, mask)

for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
    print(f"  {file.stat().st_size:>8,} bytes  {file.relative_to(checkpoint)}")
exported = checkpoint / "huggingface"
differences["logits, exported - saved"] = largest_difference(plain_logits(str(exported), batch), trained, mask)
dtype = json.loads((exported / "config.json").read_text())["dtype"]
print(f"careful: the exported weights are fp32, but its config.json says {dtype}; load it with dtype=torch.float32")
for name, difference in differences.items():
    print(f"{name:26} differ by at most {difference:.1e}")
largest = max(differences.values())
assert largest < 1e-6 < 0.1 < moved
print(f"proof: a step moved the logits by {moved:.2f}; all that should be equal differs by at most {largest:.1e}")
