"""What the benches' command lines have in common."""

from __future__ import annotations

import argparse
from dataclasses import replace

from bench.lab import Settings


def asked_for(args: argparse.Namespace, amounts: Settings) -> Settings:
    """These amounts, but for what the command line says: `rounds`, `passes`, `threads`, `native_llama`."""
    return replace(
        amounts,
        rounds=args.rounds or amounts.rounds,
        passes=args.passes or amounts.passes,
        threads=args.threads,
        native_site=args.native_llama.resolve() if args.native_llama else None,
    )
