"""Subcommands of `stableopd` that have a module of their own; heavy imports happen inside them."""
