#!/usr/bin/env bash
# The default tests in two fresh environments: the lowest versions that the package asks for (constraints-lowest.txt) on
# the oldest Python, and the newest that pip finds on the newest Python. `make versions`; docs/versions.md has results.
#
# Needs both interpreters, a network, and on Linux some 15 GB: torch on PyPI is the build for CUDA there, which runs on
# a CPU too. Chosen by variables:
#   OLDEST, NEWEST   the interpreters, python3.10 and python3.13
#   VERSIONS         the folder for the environments, runs/versions
#   SETS             which of them: "lowest newest" is both
#   TESTS            files, folders and options of pytest, such as "tests/adapters tests/pipelines tests/gating
#                    tests/training" where the whole suite takes too long; by default all
#   KEEP             1 uses an environment that is there already as it is
#   JOBS             processes, 2; 0 is one without pytest-xdist
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VERSIONS="$(realpath -m "${VERSIONS:-runs/versions}")"
read -r -a chosen <<< "${TESTS:-}"

run() {  # name, interpreter, options of pip
  local name="$1" interpreter="$2" python="$VERSIONS/$1/bin/python"
  shift 2
  if [[ " ${SETS:-lowest newest} " != *" $name "* ]]; then return 0; fi
  if [[ "${KEEP:-}" != 1 || ! -x "$python" ]]; then
    "$interpreter" -m venv --clear "$VERSIONS/$name"
    "$python" -m pip install --quiet --disable-pip-version-check "$@" -e '.[train,eval,dev]'
  fi
  echo "== $name: $("$python" --version)"
  "$python" -m pip list --disable-pip-version-check 2>/dev/null |
    grep -iE '^(torch|accelerate|diffusers|huggingface.hub|numpy|peft|pillow|pyarrow|safetensors|transformers|tyro) '
  OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
    "$python" -m pytest -n "${JOBS:-2}" -p no:cacheprovider ${chosen[@]+"${chosen[@]}"}
}

run lowest "${OLDEST:-python3.10}" -c constraints-lowest.txt
run newest "${NEWEST:-python3.13}"
