"""Whether a run reached what its readme says: an expression over its train_results.json has to be true.

python tests/check_results.py train_qwen/output_zero2/train_results.json "eval_loss_after < 1.8"
"""

import json
import sys
from pathlib import Path

file, expression = sys.argv[1:]
results = json.loads(Path(file).read_text(encoding="utf-8"))
if not eval(expression, {}, results):
    sys.exit(f"{file}: {expression} is not so: {json.dumps(results, indent=2, ensure_ascii=False)}")
print(f"{file}: {expression}")
