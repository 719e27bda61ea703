"""Names of the tasks, in the order of tables."""

from __future__ import annotations

RETRIEVAL = (
    *("single", "keys12", "keys200", "values3"),
    *("key1", "key2", "key4", "chain1", "chain2", "chain3"),
)
STEPS = "steps"
SHARES = "keys12"  # whose facts are the needles of the shares
TASKS = (*RETRIEVAL, STEPS)
RULER_TASKS = (
    *("niah_single_1", "niah_multikey_2", "niah_multikey_3"),
    *("ruler_vt", "ruler_cwe", "ruler_fwe"),
)
