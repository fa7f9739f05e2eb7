#!/usr/bin/env bash
# The default tests in two fresh environments: the lowest versions that the package asks for (constraints-lowest.txt) on
# the oldest Python, and the newest that pip finds on the newest Python. `make versions`.
#
# Needs both interpreters, a network, and on Linux some 15 GB: torch on PyPI is the build for CUDA there, which runs on
# a CPU too. OLDEST and NEWEST name the interpreters, VERSIONS the folder for the environments, JOBS the processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VERSIONS="${VERSIONS:-runs/versions}"

run() {  # name, interpreter, options of pip
  local name="$1" interpreter="$2" python="$VERSIONS/$1/bin/python"
  shift 2
  "$interpreter" -m venv --clear "$VERSIONS/$name"
  "$python" -m pip install --quiet --disable-pip-version-check "$@" -e '.[train,eval,dev]'
  echo "== $name: $("$python" --version)"
  "$python" -m pip list --disable-pip-version-check 2>/dev/null |
    grep -iE '^(torch|accelerate|diffusers|huggingface.hub|numpy|peft|pillow|pyarrow|safetensors|transformers|tyro) '
  OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$python" -m pytest -n "${JOBS:-2}" -p no:cacheprovider
}

run lowest "${OLDEST:-python3.10}" -c constraints-lowest.txt
run newest "${NEWEST:-python3.13}"
