#!/usr/bin/env bash
# Downloads a dataset from a hub, a mirror of it, or any server; goes on where it broke off, and checks SHA-256.
#
#   bash dl_dataset.sh my_name/my_dataset my_data                     all files, into the folder my_data
#   HF_ENDPOINT=https://hf-mirror.com bash dl_dataset.sh my_name/my_dataset my_data '*.tar'      these only
#   bash dl_dataset.sh https://my.server/folder my_data               what the file SHA256SUMS there lists
# REVISION and HF_TOKEN are read, too; bash unzip_data.sh unpacks what is packed.
set -euo pipefail
source=${1:?name a dataset or an address} folder=$(realpath -m "${2:?name a folder to write to}") pattern=${3:-*}
cd "$(dirname "$0")"
list=(datasets "$source")
[[ $source == http*://* ]] && list=("$source") && unset HF_TOKEN # which is the hub's

# >>> download: one copy of this block stands in both download scripts
has_checksum() { # file, SHA-256: whether it is so, or nothing to be compared
    [[ $2 == - || $(sha256sum <"$1") == "$2  -" ]]
}
download() { # SHA-256 or -, address, file
    mkdir -p "$(dirname "$3")"
    for attempt in 1 2 3 4 5; do
        if [[ ! -f $3.part || $1 == - ]] || ! has_checksum "$3.part" "$1"; then
            status=0
            curl -fsSL -C - -H @- -o "$3.part" "$2" <<<"${HF_TOKEN:+Authorization: Bearer $HF_TOKEN}" || status=$?
            # 33: the server can't go on in the middle. 22: nor can one that has nothing more to send.
            [[ $status == 33 || ($status == 22 && $1 == -) ]] && rm -f "$3.part"
            [[ $status != 0 ]] && sleep "$attempt" && continue
        fi
        has_checksum "$3.part" "$1" && mv "$3.part" "$3" && return
        rm "$3.part"
        echo "$3: wrong SHA-256, once more" >&2
    done
    echo "error: $2 can't be downloaded; run the same line again to go on" >&2
    return 1
}
files=$(python list_files.py "${list[@]}")
wanted=0
while IFS=$'\t' read -r checksum address path; do
    # shellcheck disable=SC2053  (a pattern)
    [[ $path == $pattern ]] || continue
    wanted=$((wanted + 1))
    [[ -f $folder/$path ]] && echo "$path: there already" && continue
    download "$checksum" "$address" "$folder/$path"
    [[ $checksum == - ]] && note="no SHA-256 known" || note="SHA-256 is right"
    echo "$path: $note"
done <<<"$files"
[[ $wanted != 0 ]] || { echo "error: $source has no file that is called $pattern" >&2 && exit 1; }
# <<< download
