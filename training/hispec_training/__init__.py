"""Training exits: the target's own text, frozen-backbone heads, and LoRA on the backbone.

Everything here depends on ``hispec.model`` only; ``hispec`` imports none of it, its lazy
subcommands apart.
"""
