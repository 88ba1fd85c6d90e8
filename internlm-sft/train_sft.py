"""The name under which this recipe's program used to be called."""

import sys

sys.exit("error: train_sft.py is now train.py; its flags: python train.py --help. bash train_zero2.sh has good ones.")
