#!/usr/bin/env bash
# A folder that is a Hugging Face Space: the chat page, the files that it imports, and the model, an adapter merged in.
#
#   bash spaces/make_space.sh output_zero2 my_space
#   hf upload my_name/my_space my_space . --repo-type space          makes the Space; `hf auth login` first
set -euo pipefail
[[ $# == 2 ]] || { echo "usage: bash spaces/make_space.sh MODEL FOLDER" >&2 && exit 2; }
model=$1
[[ -d "$model" ]] && model=$(realpath "$model")
mkdir -p "$2"
space=$(realpath "$2")
cd "$(dirname "$0")/.."
python export.py "$model" "$space/model"
cp spaces/app.py spaces/README.md spaces/requirements.txt demo.py examples.txt infer.py template.py rows.py files.py "$space"
echo "$space: try it by (cd $space && python app.py)"
