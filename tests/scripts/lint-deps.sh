#!/bin/sh
# Spelling, and what the dependencies bring: licenses, sources, advisories, wildcards.
# What is not installed, or cannot be fetched, is skipped and says so; exit status 0
# when everything that ran found nothing.
set -eu

status=0

if command -v typos >/dev/null 2>&1; then
    typos --config .typos.toml || status=1
else
    echo "SKIPPED typos: cargo install typos-cli" >&2
fi

if command -v cargo-deny >/dev/null 2>&1; then
    deny="cargo-deny --log-level error --config .deny.toml"
    $deny check bans licenses sources || status=1
    # The advisories are a git repository at github.com/RustSec.
    if $deny fetch db >/dev/null 2>&1; then
        $deny check advisories || status=1
    else
        echo "SKIPPED advisories: their database cannot be fetched" >&2
    fi
else
    echo "SKIPPED cargo-deny: cargo install cargo-deny" >&2
fi

exit $status
