# SPDX-License-Identifier: Apache-2.0
"""How each rule is shown, in a picture and on a terminal."""

from typing import NamedTuple

from .config import Rule


class Look(NamedTuple):
    color: str
    ansi: str  # where there are 16: the one nearest to `color` may be another rule's as well
    mark: str  # where there are no colours
    meaning: str


# The base rule in cool colours, the three rules of R2-dLLM in warm ones; told apart by every eye.
# An edit, which is no commit of a masked cell, is red.
RULE_LOOKS = {
    Rule.THRESHOLD: Look("#3b82c4", "bright_blue", ".", "confident by itself"),
    Rule.FORCED: Look("#6d7a8f", "bright_black", "!", "best of an unsure row"),
    Rule.WINDOW: Look("#00a37a", "green", "=", "confident neighbours"),
    Rule.AMBIGUITY: Look("#cc6fa8", "magenta", "&", "best of equal neighbours"),
    Rule.STABILITY: Look("#e69a00", "yellow", "~", "stopped changing"),
    Rule.BASE: Look("#3f8f8b", "cyan", "+", "picked by the base rule"),
    Rule.NEIGHBOUR: Look("#8fb339", "bright_green", "-", "near a confident one"),
    Rule.EDIT: Look("#c8413b", "red", "*", "another token before"),
}
RULE_COLORS = {rule: look.color for rule, look in RULE_LOOKS.items()}
