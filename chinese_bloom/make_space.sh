#!/usr/bin/env bash
# A folder that is a Hugging Face Space: the chat page, the files that it imports, and the model, an adapter merged in.
#
#   MODEL=output_zero2 OUTPUT=my_space bash make_space.sh
#   hf upload my_name/my_space my_space . --repo-type space          makes the Space; `hf auth login` first
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"

space=${OUTPUT:-output_space}
mkdir -p "$space"
python export.py "${MODEL:-output_zero2}" "$space/model"
# Gradio itself is the sdk_version in README.md.
grep -E "^(torch|transformers|accelerate|jinja2|pyarrow)[=>]" requirements.txt > "$space/requirements.txt"
cp spaces/app.py spaces/README.md demo.py examples.txt infer.py template.py rows.py files.py "$space"
echo "try it by (cd $space && python app.py)"
