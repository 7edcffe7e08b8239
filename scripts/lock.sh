#!/usr/bin/env bash
# Write requirements/lock.txt: the newest release of all that pyproject.toml and requirements/lock.in admit, for every
# Python and platform that they admit. Options go to `uv pip compile`; --no-upgrade keeps every release that still fits.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/pip" --disable-pip-version-check -q install uv

# uv does not read pip's settings. An index that pip was told of is passed on here, and written into no file.
index=${PIP_INDEX_URL:-$("$tools/bin/pip" config get global.index-url 2>/dev/null || true)}
if [[ -n $index ]]; then export UV_DEFAULT_INDEX=$index; fi

UV_CUSTOM_COMPILE_COMMAND="make lock" "$tools/bin/uv" --no-config --quiet pip compile \
    pyproject.toml requirements/lock.in --extra dev --extra demo --universal --python-version 3.11 \
    --no-annotate --upgrade "$@" -o requirements/lock.txt
