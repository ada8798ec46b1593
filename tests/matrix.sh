#!/usr/bin/env bash
# The tests with every supported Triton: tests/matrix.sh [VERSION...] [-- PYTEST_ARGUMENT...]
# torch pins one Triton, so each is unpacked beside the current environment and found before its own.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
unset TRITON_INTERPRET

versions=()
while (($#)) && [[ $1 != -- ]]; do
    versions+=("$1")
    shift
done
(($# == 0)) || shift
((${#versions[@]})) || versions=(3.3.1 3.4.0 3.5.1 3.6.0 3.7.1 3.9.0)
work=$(mktemp -d)

# count LOG OUTCOME...: how many tests had one of them, from pytest's last line.
count() {
    local log=$1 total=0 outcome found
    shift
    for outcome in "$@"; do
        found=$(tail -n 1 "$log" | grep -oE "[0-9]+ $outcome" || echo 0)
        total=$((total + ${found%% *}))
    done
    echo "$total"
}

status=0
for version in "${versions[@]}"; do
    log=$work/triton-$version.log
    site=$work/site-$version
    python -m pip install --quiet --no-deps --target "$site" "triton==$version"
    export PYTHONPATH=$site:$PWD
    python -c "import triton; assert triton.__version__ == '$version', triton.__file__"
    code=0
    python -m pytest -q -n auto --dist loadfile "$@" >"$log" 2>&1 || code=$?
    echo "triton $version: $(count "$log" passed) passed, $(count "$log" skipped) skipped," \
        "$(count "$log" failed errors?) failed"
    if ((code)); then
        echo "    pytest exited with $code: see $log"
        status=1
    fi
    rm -rf "$site"
done
echo "logs: $work"
exit $status
