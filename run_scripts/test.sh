#!/usr/bin/env bash
# Lints, type-checks and tests in .venv, which it makes. Arguments are handed to pytest in place of the default ones.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/setup_venv.sh
setup_venv demo,docs,eval,report,test

# The report is tested in a browser; where there is none and none can be installed, those tests skip and say so.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
    >/dev/null || echo "chromium could not be installed: tests in a browser will skip" >&2
fi

if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi

failed=0
.venv/bin/ruff check . || failed=1
.venv/bin/mypy sphere_easyedit || failed=1
.venv/bin/lint-imports --no-cache || failed=1
# A file's tests share what they made, so they stay in one process. Coverage is measured of what computes, in unit and
# integration tests (tests/conftest.py); what only subprocesses run counts as not covered.
measured=(core methods editing models.replay models.packing models.output_path models.output_path_discovery
          models.block_probe)
.venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --cov-report "" \
  "${measured[@]/#/--cov=sphere_easyedit.}" || failed=1
.venv/bin/python -m coverage report --fail-under 90 || failed=1
exit "$failed"
