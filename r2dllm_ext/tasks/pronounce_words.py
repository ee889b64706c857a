# SPDX-License-Identifier: Apache-2.0
"""The words of the first four unseen prompts of pronounce, so that a demo needs no dictionary.

Pronunciations from the CMU Pronouncing Dictionary, Copyright (C) 1993-2015 Carnegie Mellon
University, all rights reserved; redistributed under its BSD-style licence, which disclaims all
warranties. They are what `make_sample(0, 0 .. 3, split="test")` draws; a test compares them.
"""

from __future__ import annotations

PROMPTS = (
    "kingly slaughtering tran broner sherrit deferments musman",
    "consigned pughs feis nimbus patt falani lectures",
    "madore hassling schad tripi frigon plair vinegars",
    "daycare pockmarked cousens bayless widespread extenders falasco",
)
_LISTED = """
kingly: K IH NG L IY
slaughtering: S L AO T ER IH NG
tran: T R AE N
broner: B R OW N ER
sherrit: SH EH R IH T
deferments: D IH F ER M AH N T S
musman: M AH S M AH N
consigned: K AH N S AY N D
pughs: P Y UW Z
feis: F AY S
nimbus: N IH M B AH S
patt: P AE T
falani: F AH L AA N IY, F AH L AE N IY
lectures: L EH K CH ER Z
madore: M AH D AO R EY
hassling: HH AE S AH L IH NG, HH AE S L IH NG
schad: SH AE D
tripi: T R IY P IY
frigon: F R IH G AH N
plair: P L EH R
vinegars: V IH N IH G ER Z
daycare: D EY K EH R
pockmarked: P AA K M AA R K T
cousens: K UW S AH N Z, K AW S AH N Z
bayless: B EY L IH S
widespread: W AY D S P R EH D
extenders: EH K S T EH N D ER Z
falasco: F AA L AA S K OW
"""
WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    word: tuple(tuple(one.split()) for one in forms.split(","))
    for word, _, forms in (line.partition(":") for line in _LISTED.split("\n") if line)
}
