# SPDX-License-Identifier: Apache-2.0
"""Other engines' decoding rules as configurations of `decode_step`.

`rules.ENGINE_RULES` is one table, an engine's options -> fields of `DecodeConfig`;
`rules.engine_config` reads it. No engine is imported here.
"""

from .rules import ENGINE_RULES, EngineRule, engine_config

__all__ = ["ENGINE_RULES", "EngineRule", "engine_config"]
