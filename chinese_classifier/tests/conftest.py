"""The recipe's modules, and tables to read."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
