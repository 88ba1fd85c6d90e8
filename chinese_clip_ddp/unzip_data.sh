#!/usr/bin/env bash
# Unpacks a dataset: .tar, .tar.gz, .tar.bz2, .tar.xz or .zip. Nothing lands outside of the folder; a second start goes on.
#
#   bash unzip_data.sh my_pictures.tar.gz my_data          into the folder my_data
#   bash unzip_data.sh my_pictures.zip                     into the folder my_pictures beside it
set -euo pipefail
archive=$(realpath "${1:?name an archive}")
folder=$(realpath -m "${2:-$(sed -E 's/\.(tar(\.(gz|bz2|xz))?|tgz|zip)$//' <<<"$archive")}")
[[ $folder != "$archive" ]] || folder=$archive.unpacked
cd "$(dirname "$0")"
exec python unpack.py "$archive" "$folder"
